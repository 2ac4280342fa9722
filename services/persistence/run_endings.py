"""How a run ends before its last round: one function, so that nothing of it stays behind."""

from datetime import datetime
from typing import TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from persistence.tables import AssignmentRow, JobRow, RoundRow, RunRow, shorten
from persistence.transitions import UNDELIVERED, UNFINISHED_JOB, UNFINISHED_ROUND, move
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import AssignmentStatus, JobStatus, RoundStatus, RunStatus

Row = TypeVar("Row")


def lock_run(session: Session, run_id: str) -> RunRow:
    """Read a run and keep others from changing it until the transaction ends. Raises DomainError RUN_NOT_FOUND."""
    row = session.scalar(
        select(RunRow)
        .where(RunRow.id == run_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    if row is None:
        raise run_not_found(run_id)
    return row


def run_not_found(run_id: str) -> DomainError:
    """Return the error for a run that does not exist."""
    return DomainError(ErrorCode.RUN_NOT_FOUND, f"no run {run_id!r}", received=run_id)


def end_run(
    session: Session,
    run: RunRow,
    *,
    to: RunStatus,
    round_to: RoundStatus,
    code: ErrorCode | None,
    reason: str,
    now: datetime,
) -> None:
    """Move a locked run to `failed` or `stopped`, its unfinished round to `round_to`, and drop its jobs.

    A worker that still computes for it finds its lease gone. Updates that were not counted are marked, with the reason.
    """
    reason = shorten(reason) or ""
    values = {"status_reason": reason, "error_code": code, "finished_at": now}
    move(session, run, to, now=now, reason=reason, values=values)
    rounds = select(RoundRow).where(RoundRow.run_id == run.id, RoundRow.status.in_(UNFINISHED_ROUND))
    for row in session.scalars(_locked(rounds)).all():
        values = {"status_reason": reason, "finished_at": now}
        move(session, row, round_to, now=now, reason=reason, values=values)
    left = UNDELIVERED | {AssignmentStatus.SUBMITTED}
    assignments = select(AssignmentRow).where(AssignmentRow.run_id == run.id, AssignmentRow.status.in_(left))
    for assignment in session.scalars(_locked(assignments.order_by(AssignmentRow.id))).all():
        submitted = assignment.status is AssignmentStatus.SUBMITTED
        status = AssignmentStatus.REJECTED if submitted else AssignmentStatus.LOST
        why = shorten(f"the run ended ({to.value}): {reason}")
        move(session, assignment, status, now=now, reason=why, values={"reason": why})
    jobs = select(JobRow).where(JobRow.run_id == run.id, JobRow.status.in_(UNFINISHED_JOB))
    for job in session.scalars(_locked(jobs.order_by(JobRow.id))).all():
        values = {"reason": reason, "finished_at": now, "owner": None, "lease_until": None}
        move(session, job, JobStatus.FAILED, now=now, reason=f"the run ended ({to.value})", values=values)


def _locked(query: Select[Row]) -> Select[Row]:
    return query.with_for_update(key_share=True).execution_options(populate_existing=True)
