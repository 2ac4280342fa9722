"""What an operator does with a run that exists: hold it, let it go on, try a failed one again, go back to a version."""

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from persistence import events, jobs
from persistence.database import JobMessage, queue_message
from persistence.pausing import go_on, pause
from persistence.round_lifecycle import settle
from persistence.round_opening import open_next_round
from persistence.run_endings import end_unfinished_round, lock_run
from persistence.runs import get_run
from persistence.table_base import shorten
from persistence.tables import JobRow, RunRow, VersionRow
from persistence.transitions import move
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.runs import Run
from protocol.statuses import JobKind, JobStatus, RoundStatus, RunStatus

OPERATOR = "an operator"


def pause_run(session: Session, run_id: str, reason: str, now: datetime, *, by: str = OPERATOR) -> Run:
    """Hold a running run. A paused run stays as it is.

    Raises:
        DomainError: RUN_NOT_FOUND; ILLEGAL_TRANSITION, it is not running.
    """
    run = lock_run(session, run_id)
    if run.status is not RunStatus.PAUSED:
        pause(session, run, by=by, reason=reason, now=now)
    return get_run(session, run_id, now)


def resume_run(session: Session, run_id: str, now: datetime, *, by: str = OPERATOR) -> Run:
    """Let a paused run go on: its round, or if that ended meanwhile the next one. A running run stays as it is.

    Raises:
        DomainError: RUN_NOT_FOUND; ILLEGAL_TRANSITION, it is neither paused nor running.
    """
    run = lock_run(session, run_id)
    if run.status is RunStatus.RUNNING:
        return get_run(session, run_id, now)
    _require(run, RunStatus.PAUSED, "resumed")
    row = go_on(session, run, reason=f"resumed by {by}", now=now)
    if row is not None:
        settle(session, run, row, now)
    else:
        open_next_round(session, run, now)
    session.flush()
    return get_run(session, run_id, now)


def retry_run(session: Session, run_id: str, now: datetime, *, by: str = OPERATOR) -> Run:
    """Try again what a run failed in: its round, as a new attempt from the same base, or its preparation.

    What was counted in the attempt before is not counted again: the new one has its own assignments.

    Raises:
        DomainError: RUN_NOT_FOUND; ILLEGAL_TRANSITION, it has not failed.
    """
    run = lock_run(session, run_id)
    _require(run, RunStatus.FAILED, "retried")
    values = {"status_reason": None, "error_code": None, "finished_at": None}
    reason = f"retried by {by}"
    if run.latest_version is None:
        move(session, run, RunStatus.PENDING, now=now, reason=reason, values=values)
        _queue_preparation_again(session, run, reason, now)
    else:
        move(session, run, RunStatus.RUNNING, now=now, reason=reason, values=values)
        open_next_round(session, run, now)
    session.flush()
    return get_run(session, run_id, now)


def roll_back_run(
    session: Session, run_id: str, version: int, reason: str, now: datetime, *, by: str = OPERATOR
) -> Run:
    """Let the next round start from an earlier promoted version; those after it are withdrawn, and stay to be seen.

    An unfinished round is abandoned, since its base is withdrawn, and opened again from the earlier version: at once,
    or when a paused run is resumed or a failed one retried. Going back to the newest one changes nothing.

    Raises:
        DomainError: RUN_NOT_FOUND; VERSION_NOT_FOUND; VERSION_NOT_PROMOTED, it was not or was withdrawn;
            ILLEGAL_TRANSITION, the run is over or has no version yet.
    """
    run = lock_run(session, run_id)
    if run.status not in (RunStatus.RUNNING, RunStatus.PAUSED, RunStatus.FAILED) or run.latest_version is None:
        allowed = ["running", "paused", "failed"]
        detail = f"run {run.id} is {run.status.value}; a run with a version that is {', '.join(allowed)} can go back"
        raise DomainError(ErrorCode.ILLEGAL_TRANSITION, detail, expected=allowed, received=run.status.value)
    target = _usable(session, run, version)
    if target.number == run.latest_version:
        return get_run(session, run_id, now)
    data = {"from": run.latest_version, "to": target.number, "reason": reason, "by": by}
    _withdraw_after(session, run, target, shorten(f"rolled back to version {target.number}: {reason}"), now)
    run.latest_version = target.number
    why = f"the run went back to version {target.number}: {reason}"
    end_unfinished_round(
        session, run, to=RoundStatus.ABANDONED, reason=shorten(why) or "", why=why, keep_updates=False, now=now
    )
    events.append(session, EventType.RUN_ROLLED_BACK, now, run_id=run.id, data=data)
    session.flush()
    if run.status is RunStatus.RUNNING:
        open_next_round(session, run, now)
    session.flush()
    return get_run(session, run_id, now)


def _require(run: RunRow, status: RunStatus, done: str) -> None:
    if run.status is not status:
        detail = f"run {run.id} is {run.status.value}; only a {status.value} run can be {done}"
        raise DomainError(ErrorCode.ILLEGAL_TRANSITION, detail, expected=[status.value], received=run.status.value)


def _usable(session: Session, run: RunRow, number: int) -> VersionRow:
    row = session.get(VersionRow, (run.id, number), populate_existing=True)
    if row is None:
        detail = f"run {run.id} has no version {number}"
        raise DomainError(ErrorCode.VERSION_NOT_FOUND, detail, received=number)
    if not row.promoted or row.withdrawn_at is not None:
        what = "was not promoted" if not row.promoted else f"was withdrawn at {row.withdrawn_at:%Y-%m-%d %H:%M:%S}Z"
        detail = f"version {number} of run {run.id} {what}; expected one that rounds may start from"
        raise DomainError(ErrorCode.VERSION_NOT_PROMOTED, detail, received=number)
    return row


def _withdraw_after(session: Session, run: RunRow, target: VersionRow, reason: str | None, now: datetime) -> None:
    later = select(VersionRow).where(
        VersionRow.run_id == run.id,
        VersionRow.number > target.number,
        VersionRow.promoted,
        VersionRow.withdrawn_at.is_(None),
    )
    for row in session.scalars(later.execution_options(populate_existing=True)).all():
        row.withdrawn_at, row.withdrawn_reason = now, reason


def _queue_preparation_again(session: Session, run: RunRow, reason: str, now: datetime) -> None:
    query = select(JobRow.id).where(JobRow.kind == JobKind.PREPARE_RUN, JobRow.subject_id == run.id)
    job = jobs.lock_job(session, session.scalars(query).one())
    assert job is not None
    values = {"attempts": 0, "queued_at": now, "sent_at": now, "status_since": now, "finished_at": None, "reason": None}
    move(session, job, JobStatus.QUEUED, now=now, reason=reason, values=values)
    queue_message(session, JobMessage(job.id, job.kind))
