"""Why a run or a round stands where it stands, in a sentence.

Computed when asked for and not stored, so that it is never out of date and costs the hot path nothing. Times in it are
absolute.
"""

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from persistence.round_lifecycle import SUBMITTED, describe_devices, enumerate_names
from persistence.tables import JobRow, RoundRow, RunRow
from persistence.transitions import TAKES_UPDATES, UNDELIVERED, UNFINISHED_JOB
from protocol.statuses import AssignmentStatus, JobKind, JobStatus, RoundStatus, RunStatus

_STAGES = {
    RoundStatus.AGGREGATING: "is being aggregated",
    RoundStatus.CO_TUNING: "co-tunes the LLM and the proxy",
    RoundStatus.EVALUATING: "is being evaluated",
}
_JOB_OF_STAGE = {
    RoundStatus.AGGREGATING: JobKind.AGGREGATE_ROUND,
    RoundStatus.CO_TUNING: JobKind.CO_TUNE_ROUND,
    RoundStatus.EVALUATING: JobKind.EVALUATE_ROUND,
}


def run_reason(session: Session, run: RunRow) -> str | None:
    """Return why the run is in its status, or what it waits for."""
    if run.status in (RunStatus.PENDING, RunStatus.PREPARING):
        return f"the preparation {_job_reason(session, JobKind.PREPARE_RUN, run.id, 'runs')}"
    if run.status is RunStatus.RUNNING:
        row = session.scalar(select(RoundRow).where(RoundRow.run_id == run.id, RoundRow.number == run.current_round))
        return round_reason(session, run, row) if row is not None else None
    return run.status_reason


def round_reason(session: Session, run: RunRow, row: RoundRow) -> str | None:
    """Return what the round waits for, or why it ended."""
    if row.status in TAKES_UPDATES:
        return _updates_reason(session, run, row)
    if row.status in _STAGES:
        return f"round {row.number} {_job_reason(session, _JOB_OF_STAGE[row.status], row.id, _STAGES[row.status])}"
    return row.status_reason


def _updates_reason(session: Session, run: RunRow, row: RoundRow) -> str:
    devices = describe_devices(session, row)
    have = [name for name, status in devices if status in SUBMITTED]
    working = [f"{name} {_doing(status)}" for name, status in devices if status in UNDELIVERED]
    needed = int(run.config["min_updates"])
    known = [f"have: {enumerate_names(have)}"] if have else []
    known += [f"at work: {enumerate_names(working)}"] if working else []
    if not known:
        known = ["no device has taken it yet"]
    until = row.deadline_at
    if len(have) < needed:
        what = f"{needed - len(have)} more {'update' if needed - len(have) == 1 else 'updates'} of {needed}"
    else:
        what = f"stragglers, with {len(have)} updates of at least {needed}"
        until = row.grace_until or until
    return f"round {row.number} waits for {what} ({'; '.join(known)}), until {_clock(until)}"


def _job_reason(session: Session, kind: JobKind, subject_id: str, running: str) -> str:
    job = session.scalar(
        select(JobRow).where(JobRow.kind == kind, JobRow.subject_id == subject_id, JobRow.status.in_(UNFINISHED_JOB))
    )
    if job is None or job.status is JobStatus.CLAIMED:
        return running
    again = f", attempt {job.attempts + 1}: {job.reason}" if job.attempts else ""
    return f"waits for a worker since {_clock(job.queued_at)}{again}"


def _doing(status: AssignmentStatus) -> str:
    return "has not answered" if status is AssignmentStatus.OFFERED else status.value


def _clock(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}Z"
