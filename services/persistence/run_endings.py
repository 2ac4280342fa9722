"""How a run, or one attempt at a round, ends before its time: one function, so that nothing of it stays behind."""

from datetime import datetime
from typing import TypeVar

from sqlalchemy import Select, bindparam, select
from sqlalchemy.orm import Session

from persistence import late_updates
from persistence.table_base import shorten
from persistence.tables import AssignmentRow, JobRow, RoundRow, RunRow
from persistence.transitions import UNDELIVERED, UNFINISHED_JOB, UNFINISHED_ROUND, move
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import AssignmentStatus, JobStatus, RoundStatus, RunStatus

Row = TypeVar("Row")

_LOCKED = (
    select(RunRow)
    .where(RunRow.id == bindparam("run_id"))
    .with_for_update(key_share=True)
    .execution_options(populate_existing=True)
)


def lock_run(session: Session, run_id: str) -> RunRow:
    """Read a run and keep others from changing it until the transaction ends. Raises DomainError RUN_NOT_FOUND."""
    row = session.scalar(_LOCKED, {"run_id": run_id})
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

    A worker that still computes for it finds its lease gone. Updates that were not counted are marked, with the reason;
    a failed run that uses late updates keeps them for the round that a retry opens.
    """
    reason = shorten(reason) or ""
    values = {"status_reason": reason, "error_code": code, "finished_at": now, "paused_at": None, "paused_by": None}
    move(session, run, to, now=now, reason=reason, values=values)
    why = f"the run ended ({to.value}): {reason}"
    keep = to is RunStatus.FAILED and late_updates.are_used(run)
    end_unfinished_round(session, run, to=round_to, reason=reason, why=why, keep_updates=keep, now=now)


def end_unfinished_round(
    session: Session, run: RunRow, *, to: RoundStatus, reason: str, why: str, keep_updates: bool, now: datetime
) -> None:
    """Move a locked run's unfinished round to `to`, end its assignments and drop the run's jobs.

    Args:
        reason: of the round.
        why: of its assignments and jobs.
        keep_updates: whether submitted updates may still be used by a later round (`late`), or not (`rejected`).
    """
    rounds = select(RoundRow).where(RoundRow.run_id == run.id, RoundRow.status.in_(UNFINISHED_ROUND))
    for row in session.scalars(_locked(rounds)).all():
        values = {"status_reason": reason, "finished_at": now}
        move(session, row, to, now=now, reason=reason, values=values)
        late_updates.give_back(session, row)
    left = UNDELIVERED | {AssignmentStatus.SUBMITTED}
    assignments = select(AssignmentRow).where(AssignmentRow.run_id == run.id, AssignmentRow.status.in_(left))
    for assignment in session.scalars(_locked(assignments.order_by(AssignmentRow.id))).all():
        submitted = AssignmentStatus.LATE if keep_updates else AssignmentStatus.REJECTED
        status = submitted if assignment.status is AssignmentStatus.SUBMITTED else AssignmentStatus.LOST
        told = shorten(why)
        move(session, assignment, status, now=now, reason=told, values={"reason": told})
    jobs = select(JobRow).where(JobRow.run_id == run.id, JobRow.status.in_(UNFINISHED_JOB))
    for job in session.scalars(_locked(jobs.order_by(JobRow.id))).all():
        values = {"reason": reason, "finished_at": now, "owner": None, "lease_until": None}
        move(session, job, JobStatus.FAILED, now=now, reason=shorten(why), values=values)


def _locked(query: Select[Row]) -> Select[Row]:
    return query.with_for_update(key_share=True).execution_options(populate_existing=True)
