"""Transactions, refusals that are kept, the outbox after the commit, and values that both databases must agree on."""

import logging
import sqlite3
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import IntegrityError, StatementError
from sqlalchemy.orm import Session

from persistence import enrolment, runs
from persistence.column_types import finite
from persistence.database import Database, JobMessage
from persistence.errors import RoundClosed, StorageError
from persistence.tables import AssignmentRow, EnrolmentTokenRow, EventRow, RunRow
from protocol.devices import EnrolmentTokenCreate
from protocol.errors import DomainError, ErrorCode
from protocol.runs import RunCreate
from protocol.statuses import AssignmentStatus, RunStatus
from tests.persistence.conftest import Backend
from tests.persistence.world import START, World, sha

STANDALONE = RunCreate.model_validate({"name": "run", "strategy": {"name": "standalone"}, "rounds": 1})


class BrokenQueueError(Exception):
    """What a queue's library raises when its server is away."""


def test_an_error_rolls_everything_back_and_sends_nothing(world: World) -> None:
    def fail_halfway() -> None:
        with world.database.transaction() as session:
            runs.create_run(session, STANDALONE, START)
            raise KeyError("halfway")

    with pytest.raises(KeyError):
        fail_halfway()
    assert world.count(RunRow) == world.count(EventRow) == 0
    assert world.sent == []


def test_a_refusal_that_is_kept_commits_and_is_raised(world: World) -> None:
    def refuse() -> None:
        with world.database.transaction() as session:
            runs.create_run(session, STANDALONE, START)
            raise RoundClosed("too late")

    with pytest.raises(RoundClosed, match="too late"):
        refuse()
    assert world.count(RunRow) == 1
    assert len(world.sent) == 1


def test_jobs_are_sent_after_the_commit(url: str) -> None:
    seen: list[RunStatus] = []

    def dispatch(message: JobMessage) -> None:
        with database.reading() as session:  # Another connection: it sees only what is committed.
            seen.extend(run.status for run in runs.list_runs(session).items)

    database = Database(url, dispatch)
    with database.transaction() as session:
        runs.create_run(session, STANDALONE, START)
        assert seen == []
    assert seen == [RunStatus.PENDING]
    database.dispose()


def test_a_queue_that_is_away_does_not_undo_the_commit(url: str, caplog: pytest.LogCaptureFixture) -> None:
    def dispatch(message: JobMessage) -> None:
        raise BrokenQueueError("connection refused")

    database = Database(url, dispatch)
    with caplog.at_level(logging.WARNING), database.transaction() as session:
        runs.create_run(session, STANDALONE, START)
    assert "job_not_sent" in caplog.text
    assert "connection refused" in caplog.text
    with database.reading() as session:
        assert len(runs.list_runs(session).items) == 1
    database.dispose()


def test_what_is_only_read_is_not_committed(world: World) -> None:
    with world.database.reading() as session:
        enrolment.create_token(session, EnrolmentTokenCreate(), START)
        session.flush()
    assert world.count(EnrolmentTokenRow) == 0


def test_sqlite_is_set_up_for_safety(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/new.sqlite3")
    with database.reading() as session:
        settings = {
            name: session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "foreign_keys", "synchronous")
        }
    assert settings == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2}
    database.dispose()


def test_a_reader_does_not_wait_for_a_writer(world: World) -> None:
    world.create_run("standalone")
    with world.database.transaction() as writing:
        runs.create_run(writing, STANDALONE, START)
        with world.database.reading() as reading:
            assert len(runs.list_runs(reading).items) == 1


def test_foreign_keys_and_unique_pairs_hold(world: World) -> None:
    run = world.start_run()
    device = world.enrol("a")
    assignment = world.take(device)

    def insert(device_id: str) -> None:
        row = AssignmentRow(
            id=sha(device_id),
            run_id=run.run_id,
            round_id=assignment.round_id,
            device_id=device_id,
            status=AssignmentStatus.OFFERED,
            losses={},
            metrics={},
            offered_at=START,
        )
        with world.database.transaction() as session:
            session.add(row)

    with pytest.raises(IntegrityError):
        insert(device)
    with pytest.raises(IntegrityError):
        insert("dev_unknown")


def test_times_come_back_in_utc_from_any_zone(world: World) -> None:
    noon_in_tokyo = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=9)))
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(), noon_in_tokyo)
    with world.database.reading() as session:
        stored = session.get_one(EnrolmentTokenRow, token.token_id).created_at
    assert stored == noon_in_tokyo
    assert stored.tzinfo is UTC


def test_a_time_without_a_zone_is_refused(world: World) -> None:
    naive = datetime(2026, 3, 1)
    with pytest.raises(StatementError, match="expected a time with a zone"), world.database.transaction() as session:
        session.add(EnrolmentTokenRow(id="tok", token_sha256="", uses=1, created_at=naive, expires_at=naive))


def test_json_has_null_for_what_it_cannot_say() -> None:
    value = {"a": [1.0, float("nan"), {"b": float("inf")}], "c": (True, None, "x", 3)}
    assert finite(value) == {"a": [1.0, None, {"b": None}], "c": [True, None, "x", 3]}


@pytest.mark.parametrize("url", ["mysql://host/name", "sqlite://", "sqlite:///:memory:", "not an address"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(StorageError, match=r"expected sqlite:///<file> or postgresql://"):
        Database(url)


@pytest.mark.parametrize(
    "url", ["sqlite:////nonexistent/folder/file.sqlite3", "postgresql://nobody@127.0.0.1:9/none?connect_timeout=2"]
)
def test_a_database_that_does_not_answer_is_unavailable(url: str) -> None:
    database = Database(url)
    with pytest.raises(DomainError, match="does not answer") as caught:
        database.ping()
    assert caught.value.code is ErrorCode.UNAVAILABLE


def test_a_database_that_answers(world: World) -> None:
    world.database.ping()


def test_a_writer_that_waits_too_long_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.database.BUSY_TIMEOUT_SECONDS", 0.05)
    path = tmp_path / "busy.sqlite3"
    database = Database(f"sqlite:///{path}")
    database.ping()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DomainError, match="locked") as caught, database.transaction() as session:
        session.execute(text("SELECT 1"))
    assert caught.value.code is ErrorCode.UNAVAILABLE
    other.close()
    database.dispose()


def test_a_text_that_the_database_cannot_hold_is_the_callers_mistake(world: World) -> None:
    """PostgreSQL has no NUL in texts; SQLite finds no such run."""
    with pytest.raises(DomainError) as caught:
        world.run("run_\x00")
    assert caught.value.code in (ErrorCode.INVALID_FIELD, ErrorCode.RUN_NOT_FOUND)


def how_durable(session: Session) -> str:
    """What the database says of the transaction's commit."""
    if session.get_bind().dialect.name == "postgresql":
        return str(session.scalar(text("SHOW synchronous_commit")))
    return {1: "off", 2: "on"}[session.scalar(text("PRAGMA synchronous")) or 0]


def test_a_commit_waits_for_the_disk_unless_it_need_not(backend: Backend) -> None:
    url = make_url(backend.url)
    if url.get_backend_name() == "postgresql":  # the tests' own database never waits
        url = url.update_query_dict({"options": "-csynchronous_commit=on"})
    database = Database(url.render_as_string(hide_password=False))
    seen = []
    for durable in (True, False, False, True, False):
        with database.transaction(durable=durable) as session:
            seen.append(how_durable(session))
        with database.reading() as session:
            seen.append(how_durable(session))
    database.dispose()
    assert seen[0::2] == ["on", "off", "off", "on", "off"]
    # SQLite's setting is the connection's, of which the pool has one here; a reader has nothing to commit.
    assert seen[1::2] == ["on"] * 5
