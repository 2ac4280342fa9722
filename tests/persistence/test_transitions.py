"""Every pair of statuses of every machine, on the database."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import pytest
from sqlalchemy.orm import Session

from persistence.errors import IllegalTransition
from persistence.identifiers import new_id
from persistence.tables import AssignmentRow, DeviceRow, EnrolmentTokenRow, JobRow, RoundRow, RunRow
from persistence.transitions import MOVES, Movable, move
from protocol.errors import ErrorCode
from protocol.events import EventType
from protocol.statuses import AssignmentStatus, DeviceStatus, JobKind, JobStatus, RoundStatus, RunStatus
from tests.persistence.world import START, World, sha

# Written out from the design page and not from the tables under test.
EXPECTED = {
    RunRow: """
        pending: preparing failed stopped
        preparing: running failed stopped
        running: paused completed failed stopped
        paused: running failed stopped
        completed:
        failed: pending running
        stopped:
    """,
    RoundRow: """
        open: collecting failed abandoned
        collecting: aggregating failed abandoned
        aggregating: co_tuning failed abandoned
        co_tuning: evaluating failed abandoned
        evaluating: published failed abandoned
        published:
        failed:
        abandoned:
    """,
    AssignmentRow: """
        offered: accepted training uploading submitted rejected late lost
        accepted: training uploading submitted rejected late lost
        training: uploading submitted rejected late lost
        uploading: submitted rejected late lost
        submitted: counted quarantined rejected late
        counted:
        quarantined:
        rejected:
        late: counted quarantined rejected
        lost: late
    """,
    DeviceRow: """
        pending: registered revoked
        registered: offline revoked
        offline: registered revoked
        revoked:
    """,
    JobRow: """
        queued: claimed failed
        claimed: queued done failed
        done:
        failed: queued
    """,
}
STATUSES: dict[type[Movable], type[StrEnum]] = {
    RunRow: RunStatus,
    RoundRow: RoundStatus,
    AssignmentRow: AssignmentStatus,
    DeviceRow: DeviceStatus,
    JobRow: JobStatus,
}
TABLES = list(STATUSES)


def allowed(table: type[Movable]) -> dict[str, set[str]]:
    lines = [line.strip().partition(":") for line in EXPECTED[table].strip().splitlines()]
    return {status: set(moves.split()) for status, _, moves in lines}


class Maker:
    """Inserts rows in any status, each with the parents it needs."""

    def __init__(self, session: Session) -> None:
        self.session = session
        token = EnrolmentTokenRow(id="tok", token_sha256=sha("t"), uses=1, used=0, created_at=START, expires_at=START)
        self.run_row = self.run(RunStatus.RUNNING)
        self.session.add_all([token, self.run_row])
        self.session.flush()
        self.number = 0

    def run(self, status: RunStatus) -> RunRow:
        return RunRow(
            id=new_id("run", START),
            name="run",
            status=status,
            config={"min_updates": 1},
            current_round=0,
            created_at=START,
        )

    def round(self, status: RoundStatus) -> RoundRow:
        self.number += 1
        return RoundRow(
            id=new_id("rnd", START),
            run_id=self.run_row.id,
            number=self.number,
            status=status,
            base_version=0,
            metrics={},
            opened_at=START,
            deadline_at=START,
        )

    def device(self, status: DeviceStatus) -> DeviceRow:
        return DeviceRow(
            id=new_id("dev", START),
            name="a",
            status=status,
            credential_sha256=sha("c"),
            token_id="tok",
            profile={},
            activity="idle",
            enrolled_at=START,
            last_seen_at=START,
        )

    def assignment(self, status: AssignmentStatus) -> AssignmentRow:
        round_row, device = self.round(RoundStatus.OPEN), self.device(DeviceStatus.REGISTERED)
        self.session.add_all([round_row, device])
        self.session.flush()
        return AssignmentRow(
            id=new_id("asg", START),
            run_id=self.run_row.id,
            round_id=round_row.id,
            device_id=device.id,
            status=status,
            losses={},
            metrics={},
            offered_at=START,
        )

    def job(self, status: JobStatus) -> JobRow:
        return JobRow(
            id=new_id("job", START),
            kind=JobKind.PREPARE_RUN,
            subject_id=new_id("subject", START),
            run_id=self.run_row.id,
            status=status,
            attempts=0,
            queued_at=START,
            sent_at=START,
        )

    def make(self, table: type[Movable], status: Any) -> Any:
        makers: dict[type[Movable], Callable[[Any], Movable]] = {
            RunRow: self.run,
            RoundRow: self.round,
            AssignmentRow: self.assignment,
            DeviceRow: self.device,
            JobRow: self.job,
        }
        row = makers[table](status)
        self.session.add(row)
        self.session.flush()
        return row


@pytest.mark.parametrize("table", TABLES)
def test_the_tables_say_what_the_design_says(table: type[Movable]) -> None:
    told = {str(status): {str(to) for to in moves} for status, moves in MOVES[table].items()}
    assert told == allowed(table)
    assert set(told) == {status.value for status in STATUSES[table]}


@pytest.mark.parametrize("table", TABLES)
def test_every_pair(world: World, table: type[Movable]) -> None:
    legal = allowed(table)
    moved = 0
    with world.database.transaction() as session:
        maker = Maker(session)
        for current in STATUSES[table]:
            for to in STATUSES[table]:
                row = maker.make(table, current)
                if to.value in legal[current.value]:
                    move(session, row, to, now=START, reason="why")
                    moved += 1
                    session.refresh(row)
                    assert row.status is to
                else:
                    with pytest.raises(IllegalTransition) as caught:
                        move(session, row, to, now=START)
                    assert caught.value.code is ErrorCode.ILLEGAL_TRANSITION
                    assert set(caught.value.expected) == legal[current.value]
                    session.refresh(row)
                    assert row.status is current
    assert len(world.events()) == moved == sum(len(moves) for moves in legal.values())
    assert all(event.data["reason"] == "why" for event in world.events())


def test_a_move_sets_other_columns_and_writes_the_event(world: World) -> None:
    run = world.create_run()
    with world.database.transaction() as session:
        row = session.get_one(RunRow, run.run_id)
        move(session, row, RunStatus.STOPPED, now=START, reason="enough", values={"finished_at": START})
        assert (row.status, row.finished_at) == (RunStatus.STOPPED, START)
    event = world.events(run.run_id)[-1]
    assert event.type is EventType.RUN_STATUS_CHANGED
    assert event.data == {"from": "pending", "to": "stopped", "reason": "enough"}


def test_a_row_that_somebody_else_moved_is_not_moved_again(world: World) -> None:
    run = world.create_run()
    with world.database.reading() as session:
        stale = session.get_one(RunRow, run.run_id)
        session.expunge(stale)
    with world.database.transaction() as session:
        move(session, session.get_one(RunRow, run.run_id), RunStatus.STOPPED, now=START)
    with world.database.transaction() as session:
        session.add(stale)
        with pytest.raises(IllegalTransition, match="is stopped and cannot become preparing"):
            move(session, stale, RunStatus.PREPARING, now=START)
    assert world.run(run.run_id).status is RunStatus.STOPPED


def test_a_status_cannot_be_assigned(world: World) -> None:
    run = world.create_run()
    with world.database.transaction() as session, pytest.raises(AttributeError, match=r"transitions\.move"):
        session.get_one(RunRow, run.run_id).status = RunStatus.RUNNING
    assert world.run(run.run_id).status is RunStatus.PENDING
