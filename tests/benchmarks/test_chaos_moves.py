"""What the chaos checks of operators' moves and late updates: on runs that were moved, and on the same ones spoilt."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text

from benchmarks.chaos import lateness, lineage
from benchmarks.chaos.following import new_work, work_of
from benchmarks.chaos.history import History, read_history
from persistence import run_moves, schema
from persistence.blobs import FolderBlobStore
from persistence.database import Database
from persistence.tables import RoundRow
from protocol.statuses import AssignmentStatus
from tests.persistence.world import World


class Moved:
    """Two devices, three rounds: round 1 as always; 2 rolled back to version 0; the second of 2 is late in round 3."""

    def __init__(self, folder: Path) -> None:
        url = f"sqlite:///{folder / 'cotune.sqlite3'}"
        schema.upgrade(url)
        sent: list[str] = []
        self.database = Database(url, dispatch=lambda message: sent.append(message.job_id))
        self.blobs = FolderBlobStore(folder / "blobs")
        self.world = world = World(self.database, sent)
        self.first, self.second = world.enrol_many("a", "b")
        settings = {"late_updates": "next_round", "min_updates": 1, "grace_seconds": 0.0}
        self.run_id = world.start_run(rounds=3, **settings).run_id
        self._play(self.first)
        world.take(self.first)
        world.call(run_moves.pause_run, self.run_id, "why", world.now)
        world.call(run_moves.roll_back_run, self.run_id, 0, "why", world.now)
        world.call(run_moves.resume_run, self.run_id, world.now)
        slow = world.take(self.second)
        self._play(self.first)
        world.upload(slow, self.second)
        world.submit(slow, self.second)
        self._play(self.first)
        world.wait(1)
        world.start_run("standalone")

    def _play(self, device: str) -> None:
        self.world.deliver(device)
        self.world.finish_round()

    def spoil(self, statement: str) -> None:
        with self.database.transaction() as session:
            session.execute(text("PRAGMA defer_foreign_keys = ON"))
            session.execute(text(statement))

    def history(self) -> History:
        with self.database.reading() as session:
            return read_history(session, self.run_id)

    def late_ones(self) -> list[str]:
        """What is said of late updates; without the weights, as this run's files are names only."""
        history = self.history()
        for row in history.rounds:
            row.metrics = row.metrics | {"late_updates": self.told(history, row)}
            row.aggregated_adapter_sha256 = None
        return lateness.violations(history, self.blobs)

    @staticmethod
    def told(history: History, row: RoundRow) -> dict[str, int | None]:
        used = [each for each in history.assignments if each.used_in_round_id == row.id]
        return {each.id: 1 for each in used if each.status is AssignmentStatus.COUNTED}


@pytest.fixture
def moved(tmp_path: Path) -> Iterator[Moved]:
    moved = Moved(tmp_path)
    yield moved
    moved.database.dispose()


def test_a_moved_run_breaks_nothing(moved: Moved) -> None:
    played = [(row.number, row.attempt, row.status.value, row.base_version) for row in moved.history().rounds]
    assert played == [(1, 1, "published", 0), (2, 1, "abandoned", 1), (2, 2, "published", 0), (3, 1, "published", 2)]
    assert lineage.violations(moved.history()) == []
    assert moved.late_ones() == []
    assert [each.used_in_round_id for each in moved.history().assignments].count(None) == 4


OPENED = "type = 'round.opened' AND json_extract(data, '$.number') = 2 AND json_extract(data, '$.attempt') = 2"
PAUSED = "(SELECT sequence FROM events WHERE json_extract(data, '$.to') = 'paused')"
OF_ANOTHER_RUN = "(SELECT id FROM rounds ORDER BY run_id DESC LIMIT 1)"
ABANDONED = "(SELECT id FROM rounds WHERE status = 'abandoned')"
LATE = "used_in_round_id IS NOT NULL"


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (f"UPDATE events SET data = json_set(data, '$.base_version', 1) WHERE {OPENED}", "opened from version 1"),
        ("UPDATE rounds SET base_adapter_sha256 = NULL WHERE attempt = 2", "not that of version 0"),
        ("UPDATE versions SET withdrawn_at = NULL WHERE number = 1", "version 1 is not withdrawn"),
        ("UPDATE versions SET withdrawn_at = created_at WHERE number = 2", "version 2 is withdrawn"),
        (
            "UPDATE events SET data = json_set(data, '$.to', 3) WHERE type = 'run.rolled_back'",
            "rolled back from 1 to 3",
        ),
        ("DELETE FROM events WHERE type = 'run.rolled_back'", "opened from version 0; usable were [0, 1]"),
        (
            f'UPDATE events SET type = \'round.opened\', data = \'{{"number": 9, "attempt": 1, "base_version": 0}}\''
            f" WHERE sequence = {PAUSED} + 1",
            "paused, the run opened round 9.1",
        ),
        (
            'UPDATE events SET type = \'round.status_changed\', data = \'{"number": 2, "to": "aggregating"}\''
            f" WHERE sequence = {PAUSED} + 1",
            "paused, the run closed round 2",
        ),
    ],
)
def test_a_wrong_lineage_is_named(moved: Moved, statement: str, said: str) -> None:
    moved.spoil(statement)
    assert any(said in each for each in lineage.violations(moved.history())), lineage.violations(moved.history())


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (f"UPDATE assignments SET staleness = 0 WHERE {LATE}", "is 1 versions old in round 3, not 0"),
        (f"UPDATE assignments SET used_in_round_id = round_id WHERE {LATE}", "is used late in"),
        (f"UPDATE assignments SET used_in_round_id = {OF_ANOTHER_RUN} WHERE {LATE}", "is used late in"),
        (
            f"UPDATE assignments SET used_in_round_id = {ABANDONED} WHERE {LATE}",
            "was counted by round 2, which is abandoned",
        ),
        (f"UPDATE assignments SET used_in_round_id = NULL WHERE {LATE}", "no round used it"),
    ],
)
def test_a_late_update_that_is_wrong_is_named(moved: Moved, statement: str, said: str) -> None:
    moved.spoil(statement)
    assert any(said in each for each in moved.late_ones()), moved.late_ones()


def test_a_round_that_says_that_it_used_others_is_named(moved: Moved) -> None:
    history = moved.history()
    history.rounds[-1].metrics = {"late_updates": {"another": 1}}
    assert any("says that it used {'another': 1}" in each for each in lateness.violations(history, moved.blobs))


def test_files_that_the_store_lacks_are_named(moved: Moved) -> None:
    assert any("the store lacks" in each for each in lateness.violations(moved.history(), moved.blobs))


def test_a_wrong_weight_is_seen() -> None:
    values = np.random.default_rng(0)
    base = {"a": values.normal(size=(4, 8)).astype(np.float32)}
    deltas = [{"a": (1e-3 * values.normal(size=(4, 8))).astype(np.float32)} for _ in range(3)]
    late = 10 * 2**-0.5
    right = [late, 11.0, 12.0]
    made = {"a": (base["a"] + sum(w * d["a"] for w, d in zip(right, deltas, strict=True)) / sum(right)).astype("f4")}
    assert lateness.distance(base, made, deltas, right) < lateness.TOLERANCE
    for wrong in ([10.0, 11.0, 12.0], [late, 11.0, 13.0], [2 * late, 11.0, 12.0]):
        assert lateness.distance(base, made, deltas, wrong) > 10 * lateness.TOLERANCE
    assert lateness.distance(base, made, deltas, right, rate=0.9) > 10 * lateness.TOLERANCE


def test_work_that_a_paused_run_gives_out_is_named(moved: Moved) -> None:
    world = moved.world
    world.deliver(moved.first)  # the run that was open already
    run_id = world.start_run(min_updates=2).run_id
    with moved.database.reading() as session:
        before = work_of(session, run_id)
    assert new_work(before, before, "it") == []
    assignment = world.take(moved.first)
    with moved.database.reading() as session:
        offered = work_of(session, run_id)
    assert new_work(before, offered, "it") == [f"it was paused and gave out assignment {assignment.assignment_id}"]
    assert "it was paused and closed round" in new_work(before, (set(), set()), "it")[0]
    assert "it was paused and opened round" in new_work((set(), set()), before, "it")[0]
