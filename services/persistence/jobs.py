"""The outbox: what a worker is to do, and who does it.

A job is a row. It is written in the transaction that makes it necessary, sent after the commit, and sent again by
the sweep until somebody claims it. A claim is a lease: the worker renews it, and when it dies the lease runs out and
the job is queued again. The queue may lose or double messages; both are harmless.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import CursorResult, and_, select, update
from sqlalchemy.orm import Session

import tracing
from persistence import events
from persistence.database import JobMessage, queue_message
from persistence.errors import LeaseLost
from persistence.identifiers import new_id
from persistence.run_endings import end_run, lock_run
from persistence.table_base import shorten
from persistence.tables import JobRow, RunRow
from persistence.transitions import UNFINISHED_JOB, UNFINISHED_RUN, move
from protocol.errors import ErrorCode
from protocol.events import EventType
from protocol.statuses import JobKind, JobStatus, RoundStatus, RunStatus

MAX_ATTEMPTS = 5
"""A job that failed or lost its worker so often ends its run."""


@dataclass(frozen=True)
class JobRecord:
    """A claimed job."""

    job_id: str
    kind: JobKind
    run_id: str
    round_id: str | None
    attempts: int
    traceparent: str | None = None
    """The trace that the job goes on with."""


def queue(session: Session, kind: JobKind, run_id: str, round_id: str | None, now: datetime) -> str:
    """Write a job and have it sent after the commit; return its id. A second one for the same stage cannot exist."""
    job = JobRow(
        id=new_id("job", now),
        kind=kind,
        subject_id=round_id or run_id,
        run_id=run_id,
        round_id=round_id,
        status=JobStatus.QUEUED,
        attempts=0,
        queued_at=now,
        sent_at=now,
        status_since=now,
        traceparent=tracing.current_traceparent(),
    )
    session.add(job)
    session.flush()
    data = {"job_id": job.id, "kind": kind.value}
    events.append(session, EventType.JOB_QUEUED, now, run_id=run_id, round_id=round_id, data=data)
    queue_message(session, JobMessage(job.id, kind))
    return job.id


def claim(session: Session, job_id: str, owner: str, lease_seconds: float, now: datetime) -> JobRecord | None:
    """Lease the job to `owner`; None: it is done, unknown, leased to somebody whose lease runs, or its run is over.

    The first claim of a preparation moves the run from pending to preparing.
    """
    found = _lock(session, job_id)
    if found is None:
        return None
    run, job = found
    if job.status not in UNFINISHED_JOB or run.status not in UNFINISHED_RUN:
        return None
    if job.status is JobStatus.CLAIMED:
        if job.lease_until is not None and job.lease_until > now:
            return None
        if not _requeue_expired(session, run, job, now):
            return None
    lease_until = now + timedelta(seconds=lease_seconds)
    values = {"owner": owner, "lease_until": lease_until, "attempts": job.attempts + 1, "status_since": now}
    move(session, job, JobStatus.CLAIMED, now=now, values=values)
    if job.kind is JobKind.PREPARE_RUN and run.status is RunStatus.PENDING:
        move(session, run, RunStatus.PREPARING, now=now)
    return JobRecord(job.id, job.kind, job.run_id, job.round_id, job.attempts, job.traceparent)


def renew(session: Session, job_id: str, owner: str, lease_seconds: float, now: datetime) -> bool:
    """Extend the lease. False: the job is no longer this owner's; it should stop. One statement."""
    statement = (
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.owner == owner, JobRow.status == JobStatus.CLAIMED)
        .values(lease_until=now + timedelta(seconds=lease_seconds))
    )
    result = session.execute(statement, execution_options={"synchronize_session": False})
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def due_for_sending(session: Session, now: datetime, resend_after_seconds: float) -> list[JobMessage]:
    """Return the jobs to send again: queued and last sent so long ago, and those whose lease has run out.

    The latter are queued again here; one that lost its worker `MAX_ATTEMPTS` times ends its run instead.
    """
    expired = and_(JobRow.status == JobStatus.CLAIMED, JobRow.lease_until < now)
    for job_id in session.scalars(select(JobRow.id).where(expired).order_by(JobRow.id)).all():
        found = _lock(session, job_id)
        if found and found[1].status is JobStatus.CLAIMED and (found[1].lease_until or now) < now:
            _requeue_expired(session, *found, now)
    sent_before = now - timedelta(seconds=resend_after_seconds)
    due = and_(JobRow.status == JobStatus.QUEUED, JobRow.sent_at <= sent_before)
    rows = session.execute(select(JobRow.id, JobRow.kind).where(due).order_by(JobRow.id))
    return [JobMessage(row.id, row.kind) for row in rows]


def mark_sent(session: Session, job_ids: Sequence[str], now: datetime) -> None:
    """Remember that these were sent now, so that the next sweep leaves them alone."""
    statement = update(JobRow).where(JobRow.id.in_(job_ids)).values(sent_at=now)
    session.execute(statement, execution_options={"synchronize_session": False})


def fail(  # noqa: PLR0917
    session: Session, job_id: str, owner: str, code: ErrorCode, reason: str, now: datetime, *, retry: bool
) -> None:
    """Give the job up. With `retry`, and attempts left, it is queued again; else it fails and so does its run.

    Raises:
        LeaseLost: the job is not this owner's any more; then there is nothing to report.
    """
    found = _lock(session, job_id)
    if found is None:
        raise LeaseLost(job_id, owner, "there is no such job")
    run, job = found
    held_or_lost(job, owner)
    if retry and job.attempts < MAX_ATTEMPTS:
        _back_to_queue(session, job, reason, now, attempts=job.attempts)
        return
    attempts = f" (attempt {job.attempts})" if job.attempts > 1 else ""
    _fail_for_good(session, run, job, code=code, reason=f"{reason}{attempts}", now=now)


def release(session: Session, job_id: str, owner: str, reason: str, now: datetime) -> None:
    """Give a job back that nothing is wrong with: it is queued again, and the attempt does not count.

    Raises:
        LeaseLost: the job is not this owner's any more; then there is nothing to give back.
    """
    found = _lock(session, job_id)
    if found is None:
        raise LeaseLost(job_id, owner, "there is no such job")
    _, job = found
    held_or_lost(job, owner)
    _back_to_queue(session, job, reason, now, attempts=job.attempts - 1)


def held_or_lost(job: JobRow, owner: str) -> None:
    """Raise `LeaseLost` unless the locked job is claimed by `owner`.

    A lease that ran out and that nobody else took is still the owner's: the row lock makes that safe.
    """
    if job.status is not JobStatus.CLAIMED:
        raise LeaseLost(job.id, owner, f"the job is {job.status.value}")
    if job.owner != owner:
        raise LeaseLost(job.id, owner, f"it is leased to {job.owner}")


def lock_job(session: Session, job_id: str) -> JobRow | None:
    """Read a job and keep others from changing it until the transaction ends; its run must be locked already."""
    return session.scalar(
        select(JobRow)
        .where(JobRow.id == job_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )


def _lock(session: Session, job_id: str) -> tuple[RunRow, JobRow] | None:
    run_id = session.scalar(select(JobRow.run_id).where(JobRow.id == job_id))
    if run_id is None:
        return None
    run = lock_run(session, run_id)
    job = lock_job(session, job_id)
    return (run, job) if job is not None else None


def _back_to_queue(session: Session, job: JobRow, reason: str, now: datetime, *, attempts: int) -> None:
    """Queue a locked, claimed job again. The sweep sends it, a little later: what failed may fail again."""
    values: dict[str, Any] = {"owner": None, "lease_until": None, "sent_at": now, "status_since": now}
    values |= {"attempts": attempts, "reason": shorten(reason)}
    move(session, job, JobStatus.QUEUED, now=now, reason=reason, values=values)


def _requeue_expired(session: Session, run: RunRow, job: JobRow, now: datetime) -> bool:
    """Queue a locked job whose lease has run out; False: it was the last attempt, and the run has failed."""
    if job.attempts >= MAX_ATTEMPTS:
        reason = f"{job.kind.value} lost its worker {job.attempts} times; the last one was {job.owner}"
        _fail_for_good(session, run, job, code=ErrorCode.JOB_FAILED, reason=reason, now=now)
        return False
    reason = f"the lease of {job.owner} ran out at {job.lease_until:%H:%M:%S}Z"
    values = {"owner": None, "lease_until": None, "reason": reason, "status_since": now}
    move(session, job, JobStatus.QUEUED, now=now, reason=reason, values=values)
    return True


def _fail_for_good(session: Session, run: RunRow, job: JobRow, *, code: ErrorCode, reason: str, now: datetime) -> None:
    values = {"reason": shorten(reason), "finished_at": now}
    move(session, job, JobStatus.FAILED, now=now, reason=reason, values=values)
    if run.status in UNFINISHED_RUN:
        end_run(session, run, to=RunStatus.FAILED, round_to=RoundStatus.FAILED, code=code, reason=reason, now=now)
