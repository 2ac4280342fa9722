"""What a worker's stages leave: one transaction each.

Each checks that the owner still holds the job's lease (`LeaseLost` if not), does nothing when the owner's job is done
already, and in one commit stores the result, moves the round, finishes the job and queues the next one. A worker
killed between any two of them loses nothing: the job is claimed again, and the stage, being deterministic, gives the
same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persistence import events, jobs, late_updates
from persistence.errors import LeaseLost
from persistence.jobs import JobRecord, held_or_lost, lock_job
from persistence.round_lifecycle import fail_for_too_few, lock_round
from persistence.round_opening import open_next_round
from persistence.run_config import config_of
from persistence.run_endings import lock_run
from persistence.tables import AssignmentRow, JobRow, RoundRow, RunRow, VersionRow
from persistence.transitions import move
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.safetensors_header import TensorInfo
from protocol.statuses import AssignmentStatus, JobKind, JobStatus, RoundStatus, RunStatus


@dataclass(frozen=True)
class PrepareResult:
    """What the preparation made. The files must be registered (`artifacts.register`) in the same transaction or before.

    None is what the strategy has none of.
    """

    proxy_manifest_sha256: str | None = None
    adapter_sha256: str | None = None
    llm_adapter_sha256: str | None = None
    probe_set_sha256: str | None = None
    expected_tensors: Mapping[str, TensorInfo] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    message_sha256: str | None = None
    llm_vocabulary_sha256: str | None = None


@dataclass(frozen=True)
class Candidate:
    """What the server's step made, as hashes of registered files; None is what the strategy has none of."""

    adapter_sha256: str | None = None
    llm_adapter_sha256: str | None = None
    message_sha256: str | None = None
    server_state_sha256: str | None = None


def finish_prepare(session: Session, job: JobRecord, owner: str, result: PrepareResult, now: datetime) -> None:
    """Store version 0, set the run running and open round 1.

    Raises:
        LeaseLost: the job is not the owner's any more.
    """
    run = lock_run(session, job.run_id)
    row = _held_job(session, job, owner)
    if row is None:
        return
    run.proxy_manifest_sha256 = result.proxy_manifest_sha256
    run.probe_set_sha256 = result.probe_set_sha256
    run.llm_vocabulary_sha256 = result.llm_vocabulary_sha256
    if result.expected_tensors is not None:
        run.expected_tensors = {
            name: {"dtype": info.dtype, "shape": list(info.shape)} for name, info in result.expected_tensors.items()
        }
    run.latest_version = 0
    version = VersionRow(
        run_id=run.id,
        number=0,
        round_id=None,
        promoted=True,
        proxy_adapter_sha256=result.adapter_sha256,
        llm_adapter_sha256=result.llm_adapter_sha256,
        message_sha256=result.message_sha256,
        num_updates=0,
        metrics=dict(result.metrics),
        created_at=now,
    )
    _add_version(session, version, now)
    move(session, run, RunStatus.RUNNING, now=now)
    open_next_round(session, run, now)
    _finish_job(session, row, now)


def finish_aggregation(  # noqa: PLR0917
    session: Session,
    job: JobRecord,
    owner: str,
    adapter_sha256: str | None,
    counted: Sequence[str],
    metrics: Mapping[str, Any],
    now: datetime,
    *,
    server_optimizer_sha256: str | None = None,
) -> None:
    """Store the aggregate, mark the updates in it counted, and go on to co-tuning.

    Updates were refused before with `updates.reject_update`. With fewer of its own left than `min_updates` the round is
    abandoned and the run fails, TOO_FEW_UPDATES; late updates of earlier rounds come on top.

    Args:
        adapter_sha256: theta_bar; None for a strategy without a proxy.
        counted: assignment ids of the updates in the aggregate. A submitted update that is not among them is rejected.
        server_optimizer_sha256: the server optimizer's state after this round; None where it has none.

    Raises:
        LeaseLost: the job is not the owner's any more.
        IllegalTransition: an update in `counted` is not submitted.
        DomainError: ASSIGNMENT_NOT_FOUND, an id that is not of this round.
    """
    held = _hold(session, job, owner)
    if held is None:
        return
    run, round_row, row = held
    _finish_job(session, row, now)
    rows = _lock_updates(session, round_row, counted)
    needed = config_of(run).min_updates
    own = sum(row.id in counted and row.used_in_round_id is None for row in rows)
    if own < needed:
        rejected = _describe_rejected(session, round_row)
        reason = f"round {round_row.number} has {own} usable updates of the {needed} it needs{rejected}"
        fail_for_too_few(session, run, reason, now)
        return
    _count(session, round_row, rows, counted, now)
    values = {"aggregated_adapter_sha256": adapter_sha256, "server_optimizer_sha256": server_optimizer_sha256}
    _next_stage(session, round_row, RoundStatus.CO_TUNING, values=values, metrics=metrics, now=now)
    jobs.queue(session, JobKind.CO_TUNE_ROUND, run.id, round_row.id, now)


def finish_co_tuning(  # noqa: PLR0917
    session: Session, job: JobRecord, owner: str, candidate: Candidate, metrics: Mapping[str, Any], now: datetime
) -> None:
    """Store the candidate and go on to its evaluation.

    Raises:
        LeaseLost: the job is not the owner's any more.
    """
    held = _hold(session, job, owner)
    if held is None:
        return
    run, round_row, row = held
    _finish_job(session, row, now)
    values = {f"candidate_{name}": sha256 for name, sha256 in asdict(candidate).items()}
    _next_stage(session, round_row, RoundStatus.EVALUATING, values=values, metrics=metrics, now=now)
    jobs.queue(session, JobKind.EVALUATE_ROUND, run.id, round_row.id, now)


def finish_evaluation(  # noqa: PLR0917
    session: Session, job: JobRecord, owner: str, metrics: Mapping[str, Any], promoted: bool, now: datetime
) -> None:
    """Insert the round's version, publish the round, and open the next one or complete the run.

    The next round starts from the newest promoted version, so from the last good one when this one is not promoted.

    Raises:
        LeaseLost: the job is not the owner's any more.
    """
    held = _hold(session, job, owner)
    if held is None:
        return
    run, round_row, row = held
    _finish_job(session, row, now)
    num_updates = session.scalar(
        select(func.count())
        .select_from(AssignmentRow)
        .where(late_updates.in_round(round_row.id), AssignmentRow.status == AssignmentStatus.COUNTED)
    )
    version = VersionRow(
        run_id=run.id,
        number=round_row.number,
        round_id=round_row.id,
        promoted=promoted,
        proxy_adapter_sha256=round_row.candidate_adapter_sha256,
        llm_adapter_sha256=round_row.candidate_llm_adapter_sha256,
        message_sha256=round_row.candidate_message_sha256,
        server_state_sha256=round_row.candidate_server_state_sha256,
        num_updates=num_updates,
        parent=round_row.base_version,
        metrics=dict(metrics),
        created_at=now,
    )
    _add_version(session, version, now)
    verdict = f"version {version.number} is {'promoted' if promoted else 'kept and not promoted'}"
    values = {"finished_at": now, "status_reason": verdict}
    _next_stage(session, round_row, RoundStatus.PUBLISHED, values=values, metrics=metrics, now=now, reason=verdict)
    if promoted:
        run.latest_version = version.number
    if run.status is RunStatus.RUNNING:  # a paused one opens the next round when it is resumed
        open_next_round(session, run, now)


def _hold(session: Session, job: JobRecord, owner: str) -> tuple[RunRow, RoundRow, JobRow] | None:
    assert job.round_id is not None
    run, round_row = lock_round(session, job.round_id)
    row = _held_job(session, job, owner)
    return (run, round_row, row) if row is not None else None


def _held_job(session: Session, job: JobRecord, owner: str) -> JobRow | None:
    """Return the locked job if `owner` holds it, None if it has finished it; raise `LeaseLost` otherwise."""
    row = lock_job(session, job.job_id)
    if row is None:
        raise LeaseLost(job.job_id, owner, "there is no such job")
    if row.status is JobStatus.DONE and row.owner == owner:
        return None
    held_or_lost(row, owner)
    return row


def _finish_job(session: Session, row: JobRow, now: datetime) -> None:
    move(session, row, JobStatus.DONE, now=now, values={"finished_at": now, "lease_until": None, "reason": None})


def _next_stage(
    session: Session,
    row: RoundRow,
    to: RoundStatus,
    *,
    values: Mapping[str, Any],
    metrics: Mapping[str, Any],
    now: datetime,
    reason: str | None = None,
) -> None:
    grown = {**row.metrics, **metrics}
    move(session, row, to, now=now, reason=reason, values={**values, "metrics": grown})
    if metrics:
        data = {"number": row.number, **metrics}
        events.append(session, EventType.ROUND_METRICS, now, run_id=row.run_id, round_id=row.id, data=data)


def _add_version(session: Session, version: VersionRow, now: datetime) -> None:
    session.add(version)
    session.flush()
    data = {"number": version.number, "promoted": version.promoted, "num_updates": version.num_updates}
    events.append(session, EventType.VERSION_CREATED, now, run_id=version.run_id, round_id=version.round_id, data=data)


def _lock_updates(session: Session, round_row: RoundRow, counted: Sequence[str]) -> Sequence[AssignmentRow]:
    rows = session.scalars(
        select(AssignmentRow)
        .where(late_updates.in_round(round_row.id))
        .order_by(AssignmentRow.id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    ).all()
    if unknown := sorted(set(counted) - {row.id for row in rows}):
        detail = f"round {round_row.number} has no assignments {', '.join(unknown)}"
        raise DomainError(ErrorCode.ASSIGNMENT_NOT_FOUND, detail, received=unknown)
    return rows


def _count(
    session: Session, round_row: RoundRow, rows: Sequence[AssignmentRow], counted: Sequence[str], now: datetime
) -> None:
    for row in rows:
        if row.id in counted:
            late = row.used_in_round_id is not None
            move(session, row, AssignmentStatus.COUNTED, now=now, reason=_late_reason(round_row, row) if late else None)
        elif late_updates.is_to_count(row, round_row.id):
            reason = "the worker did not use it"
            move(session, row, AssignmentStatus.REJECTED, now=now, reason=reason, values={"reason": reason})


def _late_reason(round_row: RoundRow, row: AssignmentRow) -> str:
    return f"late, counted in round {round_row.number} with a base {row.staleness} versions old"


def _describe_rejected(session: Session, round_row: RoundRow) -> str:
    reasons = session.scalars(
        select(AssignmentRow.reason)
        .where(
            AssignmentRow.round_id == round_row.id,
            AssignmentRow.status.in_((AssignmentStatus.REJECTED, AssignmentStatus.QUARANTINED)),
        )
        .order_by(AssignmentRow.device_id)
    ).all()
    return f"; not counted: {'; '.join(str(reason) for reason in reasons[:5])}" if reasons else ""
