"""What a run or a round waits for, since when and until when, and the same in a sentence; or why it ended.

Computed when asked for and not stored, so that it is never out of date and costs the hot path nothing. Times are
absolute.
"""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persistence.round_lifecycle import SUBMITTED, describe_devices, enumerate_names
from persistence.round_opening import newest_round
from persistence.tables import AssignmentRow, JobRow, RoundRow, RunRow
from persistence.transitions import TAKES_UPDATES, UNDELIVERED, UNFINISHED_JOB
from protocol.runs import Waiting
from protocol.statuses import AssignmentStatus, JobKind, JobStatus, RoundStatus, RunStatus, WaitingFor

Told = tuple[str | None, Waiting | None]
"""A sentence, and what is waited for; no `Waiting` once it has ended."""


@dataclass(frozen=True)
class _Stage:
    """What a worker does, in a word and in a sentence's end."""

    job: JobKind
    what: WaitingFor
    runs: str


_PREPARATION = _Stage(JobKind.PREPARE_RUN, WaitingFor.PREPARATION, "runs")
_STAGES = {
    RoundStatus.AGGREGATING: _Stage(JobKind.AGGREGATE_ROUND, WaitingFor.AGGREGATION, "is being aggregated"),
    RoundStatus.CO_TUNING: _Stage(JobKind.CO_TUNE_ROUND, WaitingFor.CO_TUNING, "co-tunes the LLM and the proxy"),
    RoundStatus.EVALUATING: _Stage(JobKind.EVALUATE_ROUND, WaitingFor.EVALUATION, "is being evaluated"),
}


def of_run(session: Session, run: RunRow, now: datetime | None) -> Told:
    """Return what the run waits for, or why it ended.

    Args:
        now: to tell whether a worker's lease has run out; without it, it is taken to run.
    """
    if run.status in (RunStatus.PENDING, RunStatus.PREPARING):
        return _job(session, _PREPARATION, run.id, "the preparation", run.created_at, now)
    if run.status is RunStatus.PAUSED:
        return run.status_reason, _paused(run)
    if run.status is RunStatus.RUNNING:
        row = newest_round(session, run.id)
        return of_round(session, run, row, now) if row is not None else (None, None)
    return run.status_reason, None


def of_round(session: Session, run: RunRow, row: RoundRow, now: datetime | None) -> Told:
    """Return what the round waits for, or why it ended. While its run is paused, that is what it waits for first."""
    if row.status in TAKES_UPDATES:
        reason, waits = _updates(session, run, row)
        return (reason, _paused(run)) if run.status is RunStatus.PAUSED else (reason, waits)
    if row.status in _STAGES:
        since = row.closed_at or row.opened_at
        return _job(session, _STAGES[row.status], row.id, f"round {row.number}", since, now)
    return row.status_reason, None


def _paused(run: RunRow) -> Waiting:
    return Waiting(what=WaitingFor.OPERATOR, since=run.paused_at, by=run.paused_by)


def _updates(session: Session, run: RunRow, row: RoundRow) -> Told:
    devices = describe_devices(session, row)
    have = [name for name, status in devices if status in SUBMITTED]
    working = [f"{name} {_doing(status)}" for name, status in devices if status in UNDELIVERED]
    needed = int(run.config["min_updates"])
    known = [f"have: {enumerate_names(have)}"] if have else []
    known += [f"at work: {enumerate_names(working)}"] if working else []
    known = known or ["no device has taken it yet"]
    since, until = row.opened_at, row.deadline_at
    if len(have) < needed:
        more = needed - len(have)
        words = f"{more} more {'update' if more == 1 else 'updates'} of {needed}"
        what = WaitingFor.UPDATES
        if len(have) + len(working) < needed:
            what, until = WaitingFor.DEVICES, row.sampling_until or until
    else:
        words, what = f"stragglers, with {len(have)} updates of at least {needed}", WaitingFor.STRAGGLERS
        since, until = _had_enough_at(session, row, needed) or since, row.grace_until or until
    sentence = f"round {row.number} waits for {words} ({'; '.join(known)}), until {_clock(until)}"
    return sentence, Waiting(what=what, since=since, until=until)


def _had_enough_at(session: Session, row: RoundRow, needed: int) -> datetime | None:
    return session.scalar(
        select(AssignmentRow.submitted_at)
        .where(AssignmentRow.round_id == row.id, AssignmentRow.status.in_(SUBMITTED))
        .order_by(AssignmentRow.submitted_at)
        .offset(needed - 1)
        .limit(1)
    )


def _job(  # noqa: PLR0917
    session: Session, stage: _Stage, subject_id: str, subject: str, since: datetime, now: datetime | None
) -> Told:
    job = session.scalar(
        select(JobRow).where(
            JobRow.kind == stage.job, JobRow.subject_id == subject_id, JobRow.status.in_(UNFINISHED_JOB)
        )
    )
    if job is None:
        return f"{subject} {stage.runs}", Waiting(what=stage.what, since=since)
    since = job.status_since or job.queued_at
    if job.status is JobStatus.CLAIMED:
        if now is not None and job.lease_until is not None and job.lease_until < now:
            gone = f"{subject} waits for another worker: the lease of {job.owner} ran out at {_clock(job.lease_until)}"
            return gone, Waiting(what=WaitingFor.LOST_WORKER, since=job.lease_until)
        return f"{subject} {stage.runs}", Waiting(what=stage.what, since=since, until=job.lease_until)
    busy = select(func.count()).select_from(JobRow).where(JobRow.status == JobStatus.CLAIMED)
    ahead = session.scalar(busy if now is None else busy.where(JobRow.lease_until >= now)) or 0
    again = f", attempt {job.attempts + 1}: {job.reason}" if job.attempts else ""
    waits = f"{subject} waits for a worker since {_clock(job.queued_at)}{again}"
    if ahead:
        waits += f"; {ahead} other {'job is' if ahead == 1 else 'jobs are'} being done"
    return waits, Waiting(what=WaitingFor.QUEUE if ahead else WaitingFor.WORKER, since=since)


def _doing(status: AssignmentStatus) -> str:
    return "has not answered" if status is AssignmentStatus.OFFERED else status.value


def _clock(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}Z"
