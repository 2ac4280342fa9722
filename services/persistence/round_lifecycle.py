"""How a round opens, and when it closes for updates.

A round is aggregated once it has `min_updates`, and either everybody has answered, or `max_updates` came, or the grace
for stragglers is over; or at its deadline with what it has. At the deadline with less it is abandoned and its run
fails, and says who was missing: a run never waits for ever.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from persistence import events, jobs
from persistence.identifiers import new_id
from persistence.run_endings import end_run, lock_run
from persistence.tables import AssignmentRow, DeviceRow, RoundRow, RunRow
from persistence.transitions import TAKES_UPDATES, UNDELIVERED, move
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.runs import RunCreate
from protocol.statuses import AssignmentStatus, DeviceStatus, JobKind, RoundStatus, RunStatus

SUBMITTED = frozenset({AssignmentStatus.SUBMITTED, AssignmentStatus.COUNTED})
NAMES_SHOWN = 10
"""A reason names at most so many devices."""


@dataclass(frozen=True)
class Tally:
    """Where a round's devices are: how many have submitted, and how many are at work."""

    submitted: int
    working: int


def open_round(
    session: Session,
    run: RunRow,
    *,
    number: int,
    base_version: int,
    adapter_sha256: str | None,
    llm_adapter_sha256: str | None,
    now: datetime,
) -> RoundRow:
    """Open a round of a locked run, from a version's adapters."""
    config = RunCreate.model_validate(run.config)
    row = RoundRow(
        id=new_id("rnd", now),
        run_id=run.id,
        number=number,
        status=RoundStatus.OPEN,
        base_version=base_version,
        base_adapter_sha256=adapter_sha256,
        base_llm_adapter_sha256=llm_adapter_sha256,
        metrics={},
        opened_at=now,
        deadline_at=now + timedelta(seconds=config.round_deadline_seconds),
    )
    session.add(row)
    run.current_round = number
    session.flush()
    data = {"number": number, "base_version": base_version, "deadline_at": row.deadline_at.isoformat()}
    events.append(session, EventType.ROUND_OPENED, now, run_id=run.id, round_id=row.id, data=data)
    return row


def lock_round(session: Session, round_id: str) -> tuple[RunRow, RoundRow]:
    """Read a round and its run, and keep others from changing them until the transaction ends.

    Raises:
        DomainError: ROUND_NOT_FOUND.
    """
    run_id = session.scalar(select(RoundRow.run_id).where(RoundRow.id == round_id))
    if run_id is None:
        raise DomainError(ErrorCode.ROUND_NOT_FOUND, f"no round {round_id!r}", received=round_id)
    run = lock_run(session, run_id)
    row = session.scalars(
        select(RoundRow)
        .where(RoundRow.id == round_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).one()
    return run, row


def settle(session: Session, run: RunRow, row: RoundRow, now: datetime) -> None:
    """Close a locked round, or give it up, if it is time; else change nothing but the start of the grace."""
    if row.status not in TAKES_UPDATES or run.status is not RunStatus.RUNNING:
        return
    config = RunCreate.model_validate(run.config)
    tally = _count(session, row)
    if tally.submitted >= config.min_updates:
        if row.grace_until is None:
            row.grace_until = min(row.deadline_at, now + timedelta(seconds=config.grace_seconds))
        if _nobody_is_waited_for(session, run, row, tally, now):
            _close(session, run, row, tally, now)
    elif now >= row.deadline_at:
        when = f"at its deadline, {row.deadline_at:%Y-%m-%d %H:%M:%S}Z,"
        _give_up(session, run, row, needed=config.min_updates, when=when, now=now)
    elif config.device_ids is not None:
        possible = tally.submitted + tally.working + _may_still_join(session, run, row, tally)
        if possible < config.min_updates:
            when = "and no other device of the run can still send one:"
            _give_up(session, run, row, needed=config.min_updates, when=when, now=now)


def _nobody_is_waited_for(session: Session, run: RunRow, row: RoundRow, tally: Tally, now: datetime) -> bool:
    if row.grace_until is not None and now >= row.grace_until:
        return True
    if run.max_updates is not None and tally.submitted >= run.max_updates:
        return True
    return tally.working == 0 and _may_still_join(session, run, row, tally) == 0


def _count(session: Session, row: RoundRow) -> Tally:
    states = session.execute(
        select(AssignmentRow.status, func.count())
        .where(AssignmentRow.round_id == row.id)
        .group_by(AssignmentRow.status)
    ).all()
    submitted = sum(number for status, number in states if status in SUBMITTED)
    working = sum(number for status, number in states if status in UNDELIVERED)
    return Tally(submitted, working)


def _may_still_join(session: Session, run: RunRow, row: RoundRow, tally: Tally) -> int:
    """Count the devices without an assignment that may still take one, as far as `max_updates` leaves room.

    They are the run's `device_ids` unless revoked, or without such a list all that are registered now. It looks at
    every device, so it is asked only when the answer decides something.
    """
    assigned = exists().where(AssignmentRow.round_id == row.id, AssignmentRow.device_id == DeviceRow.id)
    absent = select(func.count()).select_from(DeviceRow).where(~assigned)
    if run.device_ids is None:
        absent = absent.where(DeviceRow.status == DeviceStatus.REGISTERED)
    else:
        absent = absent.where(DeviceRow.id.in_(run.device_ids), DeviceRow.status != DeviceStatus.REVOKED)
    free = session.scalar(absent) or 0
    if run.max_updates is None:
        return free
    return min(free, max(0, run.max_updates - tally.submitted - tally.working))


def _close(session: Session, run: RunRow, row: RoundRow, tally: Tally, now: datetime) -> None:
    reason = f"{tally.submitted} {'update' if tally.submitted == 1 else 'updates'}"
    if tally.working:
        reason += f"; {tally.working} at work {'was' if tally.working == 1 else 'were'} not waited for"
    move(session, row, RoundStatus.AGGREGATING, now=now, reason=reason, values={"closed_at": now})
    jobs.queue(session, JobKind.AGGREGATE_ROUND, run.id, row.id, now)


def _give_up(session: Session, run: RunRow, row: RoundRow, *, needed: int, when: str, now: datetime) -> None:
    devices = describe_devices(session, row)
    have = sum(status in SUBMITTED for _, status in devices)
    others = [f"{name} ({status.value})" for name, status in devices if status not in SUBMITTED]
    missing = f"without an update: {enumerate_names(others)}" if others else "no other device took it"
    reason = f"round {row.number} has {have} of the {needed} updates it needs {when} {missing}"
    fail_for_too_few(session, run, reason, now)


def fail_for_too_few(session: Session, run: RunRow, reason: str, now: datetime) -> None:
    """End a locked run whose round cannot get the updates it needs."""
    end_run(
        session,
        run,
        to=RunStatus.FAILED,
        round_to=RoundStatus.ABANDONED,
        code=ErrorCode.TOO_FEW_UPDATES,
        reason=reason,
        now=now,
    )


def describe_devices(session: Session, row: RoundRow) -> list[tuple[str, AssignmentStatus]]:
    """Return the name and the status of each device of a round, in device order."""
    rows = session.execute(
        select(DeviceRow.name, AssignmentRow.status)
        .join(AssignmentRow, AssignmentRow.device_id == DeviceRow.id)
        .where(AssignmentRow.round_id == row.id)
        .order_by(DeviceRow.id)
    )
    return [(name, status) for name, status in rows]


def enumerate_names(names: list[str]) -> str:
    """Join names with commas; of many, only the first."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
