"""When a round closes for updates.

A round is aggregated once it has `min_updates`, and either everybody has answered, or `max_updates` came, or the grace
for stragglers is over; or at its deadline with what it has. At the deadline with less it is abandoned and its run
fails, and says who was missing; where a sampling deadline is set, it fails or pauses already when too few devices have
taken the round by then. A run never waits for ever. While it is paused none of this happens.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import bindparam, exists, func, select
from sqlalchemy.orm import Session

from persistence import jobs, late_updates
from persistence.pausing import pause
from persistence.run_config import config_of
from persistence.run_endings import end_run
from persistence.tables import AssignmentRow, DeviceRow, FederationDeviceRow, RoundRow, RunRow
from persistence.transitions import TAKES_UPDATES, UNDELIVERED, move
from protocol.errors import DomainError, ErrorCode
from protocol.runs import RunCreate
from protocol.statuses import AssignmentStatus, DeviceStatus, JobKind, RoundStatus, RunStatus

SUBMITTED = frozenset({AssignmentStatus.SUBMITTED, AssignmentStatus.COUNTED})
NAMES_SHOWN = 10
"""A reason names at most so many devices."""


# Put together once: to build a statement takes longer than to execute it. The order is that of the locks: the run's
# first, as everywhere.
_LOCKED = (
    select(RunRow, RoundRow)
    .join(RoundRow, RoundRow.run_id == RunRow.id)
    .where(RoundRow.id == bindparam("round_id"))
    .with_for_update(key_share=True)
    .execution_options(populate_existing=True)
)
_STATES = (
    select(AssignmentRow.status, func.count())
    .where(AssignmentRow.round_id == bindparam("round_id"))
    .group_by(AssignmentRow.status)
)


@dataclass(frozen=True)
class Tally:
    """Where a round's devices are: how many have submitted, and how many are at work."""

    submitted: int
    working: int


def lock_round(session: Session, round_id: str) -> tuple[RunRow, RoundRow]:
    """Read a round and its run, and keep others from changing them until the transaction ends.

    Raises:
        DomainError: ROUND_NOT_FOUND.
    """
    found = session.execute(_LOCKED, {"round_id": round_id}).first()
    if found is None:
        raise DomainError(ErrorCode.ROUND_NOT_FOUND, f"no round {round_id!r}", received=round_id)
    run, row = found
    return run, row


def settle(session: Session, run: RunRow, row: RoundRow, now: datetime) -> None:
    """Close a locked round, or give it up, if it is time; else change nothing but the start of the grace."""
    if row.status not in TAKES_UPDATES or run.status is not RunStatus.RUNNING:
        return
    config = config_of(run)
    tally = _count(session, row)
    if tally.submitted >= config.min_updates:
        if row.grace_until is None:
            row.grace_until = min(row.deadline_at, now + timedelta(seconds=config.grace_seconds))
        if _nobody_is_waited_for(session, run, row, tally, now):
            _close(session, run, row, tally, now)
    elif row.sampling_until is not None and now >= row.sampling_until and not _sampled(row, tally, config):
        _too_few_devices(session, run, row, tally, config, now)
    elif now >= row.deadline_at:
        when = f"at its deadline, {row.deadline_at:%Y-%m-%d %H:%M:%S}Z,"
        _give_up(session, run, row, needed=config.min_updates, when=when, now=now)
    elif config.device_ids is not None:
        possible = tally.submitted + tally.working + _may_still_join(session, run, row, tally)
        if possible < config.min_updates:
            when = "and no other device of the run can still send one:"
            _give_up(session, run, row, needed=config.min_updates, when=when, now=now)


def _sampled(row: RoundRow, tally: Tally, config: RunCreate) -> bool:
    """Return whether enough devices had taken the round at its sampling deadline, which is then done with."""
    enough = tally.submitted + tally.working >= config.min_updates
    if enough:
        row.sampling_until = None
    return enough


def _too_few_devices(  # noqa: PLR0917
    session: Session, run: RunRow, row: RoundRow, tally: Tally, config: RunCreate, now: datetime
) -> None:
    have = tally.submitted + tally.working
    when = f"{row.sampling_until:%Y-%m-%d %H:%M:%S}Z"
    reason = f"{have} of the {config.min_updates} devices that round {row.number} needs had taken it by {when}"
    if config.too_few_devices == "pause":
        pause(session, run, by="the sampling deadline", reason=reason, now=now)
    else:
        fail_for_too_few(session, run, reason, now, code=ErrorCode.TOO_FEW_DEVICES)


def _nobody_is_waited_for(session: Session, run: RunRow, row: RoundRow, tally: Tally, now: datetime) -> bool:
    if row.grace_until is not None and now >= row.grace_until:
        return True
    if run.max_updates is not None and tally.submitted >= run.max_updates:
        return True
    return tally.working == 0 and _may_still_join(session, run, row, tally) == 0


def _count(session: Session, row: RoundRow) -> Tally:
    states = session.execute(_STATES, {"round_id": row.id}).all()
    submitted = sum(number for status, number in states if status in SUBMITTED)
    working = sum(number for status, number in states if status in UNDELIVERED)
    return Tally(submitted, working)


def _may_still_join(session: Session, run: RunRow, row: RoundRow, tally: Tally) -> int:
    """Count the devices without an assignment that may still take one, as far as `max_updates` leaves room.

    They are the run's `device_ids` unless revoked, or without such a list all of its federation that are registered
    now. It looks at every device, so it is asked only when the answer decides something.
    """
    assigned = exists().where(AssignmentRow.round_id == row.id, AssignmentRow.device_id == DeviceRow.id)
    member = exists().where(
        FederationDeviceRow.federation == run.federation, FederationDeviceRow.device_id == DeviceRow.id
    )
    absent = select(func.count()).select_from(DeviceRow).where(~assigned, member)
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
    if late := late_updates.take(session, run, row):
        reason += f"; and {late} late {'one' if late == 1 else 'ones'} of earlier rounds"
    move(session, row, RoundStatus.AGGREGATING, now=now, reason=reason, values={"closed_at": now})
    jobs.queue(session, JobKind.AGGREGATE_ROUND, run.id, row.id, now)


def _give_up(session: Session, run: RunRow, row: RoundRow, *, needed: int, when: str, now: datetime) -> None:
    devices = describe_devices(session, row)
    have = sum(status in SUBMITTED for _, status in devices)
    others = [f"{name} ({status.value})" for name, status in devices if status not in SUBMITTED]
    missing = f"without an update: {enumerate_names(others)}" if others else "no other device took it"
    reason = f"round {row.number} has {have} of the {needed} updates it needs {when} {missing}"
    fail_for_too_few(session, run, reason, now)


def fail_for_too_few(
    session: Session, run: RunRow, reason: str, now: datetime, *, code: ErrorCode = ErrorCode.TOO_FEW_UPDATES
) -> None:
    """End a locked run whose round cannot get the devices or updates it needs."""
    end_run(
        session,
        run,
        to=RunStatus.FAILED,
        round_to=RoundStatus.ABANDONED,
        code=code,
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
