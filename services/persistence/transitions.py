"""The state machines, as data, and the one function that applies them.

A pair that is not in a table is illegal. A move is one UPDATE with the old status in its WHERE, so of two actors that
move the same row one wins and the other gets `IllegalTransition`. The event is part of the same transaction.
"""

import functools
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import CursorResult, TableClause, Update, bindparam, select, update
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import set_committed_value

from persistence import events
from persistence.errors import IllegalTransition
from persistence.tables import AssignmentRow, DeviceRow, JobRow, RoundRow, RunRow
from protocol.events import EventType
from protocol.statuses import AssignmentStatus, DeviceStatus, JobStatus, RoundStatus, RunStatus

Status = TypeVar("Status", bound=StrEnum)
Moves = Mapping[Status, frozenset[Status]]
Movable = RunRow | RoundRow | AssignmentRow | DeviceRow | JobRow

_RUN_ENDS = {RunStatus.FAILED, RunStatus.STOPPED}
RUN_MOVES: Moves[RunStatus] = {
    RunStatus.PENDING: frozenset({RunStatus.PREPARING} | _RUN_ENDS),
    RunStatus.PREPARING: frozenset({RunStatus.RUNNING} | _RUN_ENDS),
    RunStatus.RUNNING: frozenset({RunStatus.PAUSED, RunStatus.COMPLETED} | _RUN_ENDS),
    RunStatus.PAUSED: frozenset({RunStatus.RUNNING} | _RUN_ENDS),
    RunStatus.COMPLETED: frozenset(),
    RunStatus.FAILED: frozenset({RunStatus.PENDING, RunStatus.RUNNING}),  # An operator retries it.
    RunStatus.STOPPED: frozenset(),
}

_ROUND_ENDS = {RoundStatus.FAILED, RoundStatus.ABANDONED}
ROUND_MOVES: Moves[RoundStatus] = {
    RoundStatus.OPEN: frozenset({RoundStatus.COLLECTING} | _ROUND_ENDS),
    RoundStatus.COLLECTING: frozenset({RoundStatus.AGGREGATING} | _ROUND_ENDS),
    RoundStatus.AGGREGATING: frozenset({RoundStatus.CO_TUNING} | _ROUND_ENDS),
    RoundStatus.CO_TUNING: frozenset({RoundStatus.EVALUATING} | _ROUND_ENDS),
    RoundStatus.EVALUATING: frozenset({RoundStatus.PUBLISHED} | _ROUND_ENDS),
    RoundStatus.PUBLISHED: frozenset(),
    RoundStatus.FAILED: frozenset(),
    RoundStatus.ABANDONED: frozenset(),
}

_NOT_DELIVERED = {AssignmentStatus.REJECTED, AssignmentStatus.LATE, AssignmentStatus.LOST}
_ON_THE_WAY = [
    AssignmentStatus.OFFERED,
    AssignmentStatus.ACCEPTED,
    AssignmentStatus.TRAINING,
    AssignmentStatus.UPLOADING,
    AssignmentStatus.SUBMITTED,
]
ASSIGNMENT_MOVES: Moves[AssignmentStatus] = {
    # Progress reports may be lost on the way, so a device may skip steps, but never go back.
    **{
        status: frozenset(set(_ON_THE_WAY[place + 1 :]) | _NOT_DELIVERED)
        for place, status in enumerate(_ON_THE_WAY[:-1])
    },
    AssignmentStatus.SUBMITTED: frozenset(
        # Late: kept from a failed round.
        {
            AssignmentStatus.COUNTED,
            AssignmentStatus.QUARANTINED,
            AssignmentStatus.REJECTED,
            AssignmentStatus.LATE,
        }
    ),
    AssignmentStatus.COUNTED: frozenset(),
    AssignmentStatus.QUARANTINED: frozenset(),
    AssignmentStatus.REJECTED: frozenset(),
    # By a later round.
    AssignmentStatus.LATE: frozenset(
        {AssignmentStatus.COUNTED, AssignmentStatus.QUARANTINED, AssignmentStatus.REJECTED}
    ),
    AssignmentStatus.LOST: frozenset({AssignmentStatus.LATE}),  # Given up, and then it came after all.
}

DEVICE_MOVES: Moves[DeviceStatus] = {
    DeviceStatus.PENDING: frozenset({DeviceStatus.REGISTERED, DeviceStatus.REVOKED}),
    DeviceStatus.REGISTERED: frozenset({DeviceStatus.OFFLINE, DeviceStatus.REVOKED}),
    DeviceStatus.OFFLINE: frozenset({DeviceStatus.REGISTERED, DeviceStatus.REVOKED}),
    DeviceStatus.REVOKED: frozenset(),
}

JOB_MOVES: Moves[JobStatus] = {
    JobStatus.QUEUED: frozenset({JobStatus.CLAIMED, JobStatus.FAILED}),
    JobStatus.CLAIMED: frozenset({JobStatus.QUEUED, JobStatus.DONE, JobStatus.FAILED}),
    JobStatus.DONE: frozenset(),
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),  # A preparation that an operator retries.
}

MOVES: dict[type[Movable], Mapping[Any, frozenset[Any]]] = {
    RunRow: RUN_MOVES,
    RoundRow: ROUND_MOVES,
    AssignmentRow: ASSIGNMENT_MOVES,
    DeviceRow: DEVICE_MOVES,
    JobRow: JOB_MOVES,
}

UNFINISHED_RUN = frozenset(RunStatus) - {RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STOPPED}
UNFINISHED_ROUND = frozenset(status for status, moves in ROUND_MOVES.items() if moves)
UNFINISHED_JOB = frozenset({JobStatus.QUEUED, JobStatus.CLAIMED})
TAKES_UPDATES = frozenset({RoundStatus.OPEN, RoundStatus.COLLECTING})
"""A round in one of these offers assignments and accepts updates."""

UNDELIVERED = frozenset(_ON_THE_WAY[:-1])
"""An assignment in one of these is still the device's to finish."""

_JOB_EVENTS = {
    JobStatus.QUEUED: EventType.JOB_RESENT,
    JobStatus.CLAIMED: EventType.JOB_CLAIMED,
    JobStatus.DONE: EventType.JOB_DONE,
    JobStatus.FAILED: EventType.JOB_FAILED,
}


def check(subject: str, moves: Moves[Status], current: Status, to: Status) -> None:
    """Raise `IllegalTransition` unless the table allows the move."""
    if to not in moves[current]:
        raise IllegalTransition(subject, current, to, sorted(moves[current]))


def move(
    session: Session,
    row: Movable,
    to: StrEnum,
    *,
    now: datetime,
    reason: str | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Move `row` from its status to another, set `values` in the same statement, and append the event.

    Args:
        row: as read in this session; its status is the one that the move starts from.
        reason: why, for the event. It is not stored in the row; give it in `values` for that.
        values: other columns to set, by attribute name.

    Raises:
        IllegalTransition: the table does not allow it, or the row has another status by now.
    """
    table = type(row)
    subject = f"{row.__tablename__.removesuffix('s')} {row.id}"
    current = row.status
    check(subject, MOVES[table], current, to)
    columns = {"status": to, **(values or {})}
    statement = _moving(table, tuple(sorted(columns)))
    asked = {f"new_{name}": value for name, value in columns.items()} | {"row_id": row.id, "current": current}
    session.flush()  # A statement on the table does not, as one on its class would.
    result = session.execute(statement, asked)
    assert isinstance(result, CursorResult)
    if result.rowcount != 1:
        actual = session.scalar(select(table.status).where(table.id == row.id))
        raise IllegalTransition(subject, str(actual), to, sorted(MOVES[table].get(actual, ())))
    for name, value in columns.items():
        set_committed_value(row, name, value)
    _append_event(session, row, current=current, to=to, reason=reason, now=now)


@functools.cache
def _moving(table: type[Movable], columns: tuple[str, ...]) -> Update:
    """Return the statement; to put it together takes longer than to execute it."""
    target = table.__table__
    of_row = (target.c.id == bindparam("row_id"), target.c.status == bindparam("current"))
    assert isinstance(target, TableClause)
    return update(target).where(*of_row).values({name: bindparam(f"new_{name}") for name in columns})


def _append_event(
    session: Session, row: Movable, *, current: StrEnum, to: StrEnum, reason: str | None, now: datetime
) -> None:
    data: dict[str, Any] = {"from": current.value, "to": to.value, "reason": reason}
    match row:
        case RunRow():
            events.append(session, EventType.RUN_STATUS_CHANGED, now, run_id=row.id, data=data)
        case RoundRow():
            data["number"] = row.number
            events.append(session, EventType.ROUND_STATUS_CHANGED, now, run_id=row.run_id, round_id=row.id, data=data)
        case AssignmentRow():
            data["assignment_id"] = row.id
            events.append(
                session,
                EventType.ASSIGNMENT_STATUS_CHANGED,
                now,
                run_id=row.run_id,
                round_id=row.round_id,
                device_id=row.device_id,
                data=data,
            )
        case DeviceRow():
            events.append(session, EventType.DEVICE_STATUS_CHANGED, now, device_id=row.id, data=data)
        case JobRow():
            data |= {"job_id": row.id, "kind": row.kind.value, "attempts": row.attempts}
            kind = _JOB_EVENTS[JobStatus(to)]
            events.append(session, kind, now, run_id=row.run_id, round_id=row.round_id, data=data)
