"""The checker that judges the chaos must itself notice what is wrong: each test spoils one thing of a finished run."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from benchmarks.chaos import invariants
from benchmarks.chaos.history import read_history
from benchmarks.chaos.invariants import Expected
from persistence.blobs import FolderBlobStore
from persistence.database import Database
from protocol.statuses import RoundStatus, RunStatus
from tests.persistence.world import World

ATTEMPTS = tuple((number, 1, RoundStatus.PUBLISHED, number - 1) for number in (1, 2))


class Finished:
    """A run of two devices and two rounds."""

    def __init__(self, folder: Path) -> None:
        self.sent: list[str] = []
        self.open(folder)
        world = World(self.database, self.sent)
        self.devices = world.enrol_many("a", "b")
        self.run_id = world.start_run("standalone", min_updates=2).run_id
        self.receipts = {}
        for _ in range(2):
            for device in self.devices:
                assignment = world.deliver(device)
                self.receipts[assignment.assignment_id] = world.submit(assignment, device).update_sha256
            world.finish_round()

    def open(self, folder: Path) -> None:
        url = f"sqlite:///{folder / 'cotune.sqlite3'}"
        self.folder = folder
        self.database = Database(url, dispatch=lambda message: self.sent.append(message.job_id))
        self.blobs = FolderBlobStore(folder / "blobs")

    def spoil(self, statement: str) -> None:
        with self.database.transaction() as session:
            session.execute(text("PRAGMA defer_foreign_keys = ON"))
            session.execute(text(statement))

    def violations(self, expected: Expected | None = None, **changed: object) -> list[str]:
        with self.database.reading() as session:
            history = read_history(session, self.run_id)
        values: dict[str, object] = {"receipts": self.receipts, "reference": None, "blobs": self.blobs}
        expected = expected or Expected(RunStatus.COMPLETED, ATTEMPTS, frozenset(self.devices))
        return invariants.violations(history, expected, **(values | changed))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Finished:
    folder = tmp_path_factory.mktemp("original")
    shutil.copy(migrated_sqlite, folder)
    original = Finished(folder)
    original.database.dispose()
    return original


@pytest.fixture
def finished(original: Finished, tmp_path: Path) -> Iterator[Finished]:
    """A copy of the run, to be spoilt."""
    finished = copy.copy(original)
    finished.open(shutil.copytree(original.folder, tmp_path / "copy"))
    yield finished
    finished.database.dispose()


def test_a_run_without_faults_breaks_nothing(finished: Finished) -> None:
    assert finished.violations() == []


FIRST = "(SELECT min(id) FROM assignments)"
COUNTED = "type = 'assignment.status_changed' AND json_extract(data, '$.to') = 'counted'"


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (f"UPDATE assignments SET status = 'rejected' WHERE id = {FIRST}", "not each of"),
        (f"UPDATE assignments SET status = 'lost', reason = 'x' WHERE id = {FIRST}", "has a receipt and is lost"),
        (f"UPDATE assignments SET update_sha256 = 'other' WHERE id = {FIRST}", "the receipt names"),
        (f"DELETE FROM events WHERE sequence = (SELECT min(sequence) FROM events WHERE {COUNTED})", "events end in"),
        (
            "INSERT INTO events (type, time, run_id, round_id, device_id, data)"
            f" SELECT type, time, run_id, round_id, device_id, data FROM events WHERE {COUNTED} LIMIT 1",
            "became counted 2 times",
        ),
        (
            "DELETE FROM events WHERE type = 'round.status_changed' AND json_extract(data, '$.to') = 'co_tuning'",
            "but was aggregating",
        ),
        ("UPDATE jobs SET status = 'queued' WHERE kind = 'evaluate_round'", "is queued"),
        ("UPDATE versions SET num_updates = 3 WHERE number = 2", "name (2, 3) updates"),
        (
            "UPDATE rounds SET status = 'evaluating' WHERE number = 2",
            "2.1 published from version 1, got 1.1",
        ),
        ("UPDATE rounds SET attempt = 2 WHERE number = 2", "2.2 published"),
        ("UPDATE rounds SET base_version = 0 WHERE number = 2", "has base 0; it opened from 1"),
        ("UPDATE versions SET parent = 0 WHERE number = 2", "version 2 has parent 0"),
        ("UPDATE versions SET withdrawn_at = created_at WHERE number = 1", "version 1 is withdrawn"),
        ("UPDATE assignments SET staleness = 1 WHERE id = (SELECT max(id) FROM assignments)", "no round used it"),
        (
            f"UPDATE assignments SET used_in_round_id = round_id WHERE id = {FIRST}",
            "is used late in",
        ),
        (
            "UPDATE assignments SET used_in_round_id = (SELECT id FROM rounds WHERE number = 2), staleness = 2"
            " WHERE round_id = (SELECT id FROM rounds WHERE number = 1)",
            "is 1 versions old in round 2, not 2",
        ),
        ("UPDATE runs SET status = 'running'", "the run is running, not completed"),
    ],
)
def test_what_is_wrong_is_named(finished: Finished, statement: str, said: str) -> None:
    finished.spoil(statement)
    assert any(said in each for each in finished.violations()), finished.violations()


def test_other_adapters_and_spoilt_files_are_named(finished: Finished) -> None:
    stored = finished.blobs.put_bytes(b"an adapter")
    assert "without faults" in finished.violations(reference={1: (stored.sha256, None)})[0]
    with finished.database.reading() as session:
        history = read_history(session, finished.run_id)
    history.versions[1].proxy_adapter_sha256 = stored.sha256
    finished.blobs.path(stored.sha256).write_bytes(b"another adapter")
    expected = Expected(RunStatus.COMPLETED, ATTEMPTS, frozenset(finished.devices))
    found = invariants.violations(history, expected, receipts={}, reference=None, blobs=finished.blobs)
    assert f"the file {stored.sha256} holds other bytes" in found
