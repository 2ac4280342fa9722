"""Rounds: show, hand to a worker, and what the sweep does with them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, or_, select, tuple_
from sqlalchemy.orm import Session, aliased

from persistence import paging, waiting
from persistence.round_lifecycle import lock_round, settle
from persistence.run_config import config_of
from persistence.runs import find_run
from persistence.tables import AssignmentRow, DeviceRow, RoundRow, RunRow
from persistence.transitions import TAKES_UPDATES, UNDELIVERED, move
from protocol.errors import DomainError, ErrorCode
from protocol.pages import Page
from protocol.runs import Round, RoundDevice, RunCreate
from protocol.statuses import AssignmentStatus, DeviceStatus, RoundStatus


@dataclass(frozen=True)
class RoundContext:
    """What a worker needs to know of a round, whichever stage it is in. Hashes name files of the blob store."""

    round_id: str
    run_id: str
    run_name: str
    number: int
    config: RunCreate
    base_version: int
    base_adapter_sha256: str | None
    base_llm_adapter_sha256: str | None
    base_message_sha256: str | None
    """What devices were sent for this round."""
    base_server_state_sha256: str | None
    """What the server kept with the base version."""
    base_optimizer_sha256: str | None
    """State of the server's optimizer after the round that made the base version."""
    aggregated_adapter_sha256: str | None
    candidate_adapter_sha256: str | None
    candidate_llm_adapter_sha256: str | None
    proxy_manifest_sha256: str | None
    probe_set_sha256: str | None
    metrics: dict[str, Any]


def get_round(
    session: Session, run_id: str, number: int, *, attempt: int | None = None, now: datetime | None = None
) -> Round:
    """Return a round of a run: an attempt at it, or the newest one.

    Args:
        now: without it, a worker whose lease has run out is taken for one that works.

    Raises:
        DomainError: RUN_NOT_FOUND or ROUND_NOT_FOUND.
    """
    run = find_run(session, run_id)
    query = select(RoundRow).where(RoundRow.run_id == run_id, RoundRow.number == min(number, 2**31 - 1))
    if attempt is not None:
        query = query.where(RoundRow.attempt == min(attempt, 2**31 - 1))
    newest = query.order_by(RoundRow.attempt.desc()).limit(1).execution_options(populate_existing=True)
    row = session.scalar(newest)
    if row is None:
        which = f"{number}" if attempt is None else f"attempt {attempt} at {number}"
        detail = f"run {run_id} has rounds 1 to {run.current_round}, not {which}"
        raise DomainError(ErrorCode.ROUND_NOT_FOUND, detail, received=number)
    return _round(session, run, row, now)


def list_rounds(
    session: Session, run_id: str, *, cursor: str | None = None, limit: int = 50, now: datetime | None = None
) -> Page[Round]:
    """Return each attempt at a run's rounds, the newest first.

    Raises:
        DomainError: RUN_NOT_FOUND or INVALID_FIELD (the cursor).
    """
    run = find_run(session, run_id)
    query = select(RoundRow).where(RoundRow.run_id == run_id)
    if cursor is not None:
        number, _, attempt = cursor.partition(".")
        before = tuple_(RoundRow.number, RoundRow.attempt) < (number_cursor(number), number_cursor(attempt))
        query = query.where(before)
    query = query.order_by(RoundRow.number.desc(), RoundRow.attempt.desc())
    rows, more = paging.take(session, query, limit)
    items = [_round(session, run, row, now) for row in rows]
    return Page[Round](items=items, next_cursor=f"{rows[-1].number}.{rows[-1].attempt}" if more else None)


def number_cursor(cursor: str) -> int:
    """Return the number in a cursor that this package gave out. Raises DomainError INVALID_FIELD."""
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 10):
        detail = f"`cursor` must be a `next_cursor` of this list, got {cursor[:40]!r}"
        raise DomainError(ErrorCode.INVALID_FIELD, detail, received=cursor[:40])
    return int(cursor)


def get_context(session: Session, round_id: str) -> RoundContext:
    """Return what a worker needs for any stage of a round. Raises DomainError ROUND_NOT_FOUND."""
    found = session.execute(
        select(RoundRow, RunRow)
        .join(RunRow, RunRow.id == RoundRow.run_id)
        .where(RoundRow.id == round_id)
        .execution_options(populate_existing=True)
    ).first()
    if found is None:
        raise DomainError(ErrorCode.ROUND_NOT_FOUND, f"no round {round_id!r}", received=round_id)
    row, run = found
    made_base = (  # version 0 was made by no round, and of several attempts only one was published
        RoundRow.run_id == run.id,
        RoundRow.number == row.base_version,
        RoundRow.status == RoundStatus.PUBLISHED,
    )
    return RoundContext(
        round_id=row.id,
        run_id=run.id,
        run_name=run.name,
        number=row.number,
        config=config_of(run),
        base_version=row.base_version,
        base_adapter_sha256=row.base_adapter_sha256,
        base_llm_adapter_sha256=row.base_llm_adapter_sha256,
        base_message_sha256=row.base_message_sha256,
        base_server_state_sha256=row.base_server_state_sha256,
        base_optimizer_sha256=session.scalar(select(RoundRow.server_optimizer_sha256).where(*made_base)),
        aggregated_adapter_sha256=row.aggregated_adapter_sha256,
        candidate_adapter_sha256=row.candidate_adapter_sha256,
        candidate_llm_adapter_sha256=row.candidate_llm_adapter_sha256,
        proxy_manifest_sha256=run.proxy_manifest_sha256,
        probe_set_sha256=run.probe_set_sha256,
        metrics=row.metrics,
    )


def close_due_rounds(session: Session, now: datetime) -> int:
    """Close or give up each round for which it is time; return how many. For the sweep."""
    taking = select(RoundRow.id).where(RoundRow.status.in_(TAKES_UPDATES)).order_by(RoundRow.run_id, RoundRow.id)
    closed = 0
    for round_id in session.scalars(taking).all():
        run, row = lock_round(session, round_id)
        settle(session, run, row, now)
        closed += row.status not in TAKES_UPDATES
    return closed


def mark_lost_assignments(session: Session, now: datetime) -> int:
    """Mark what devices did not deliver before their round closed, or before they were revoked. For the sweep.

    Returns:
        How many.
    """
    rows = session.execute(
        select(AssignmentRow, RoundRow.number, func.coalesce(RoundRow.closed_at, RoundRow.finished_at))
        .join(RoundRow, RoundRow.id == AssignmentRow.round_id)
        .join(DeviceRow, DeviceRow.id == AssignmentRow.device_id)
        .where(
            AssignmentRow.status.in_(UNDELIVERED),
            or_(RoundRow.status.not_in(TAKES_UPDATES), DeviceRow.status == DeviceStatus.REVOKED),
        )
        .order_by(AssignmentRow.id)
        .with_for_update(of=AssignmentRow, skip_locked=True, key_share=True)
        .execution_options(populate_existing=True)
    ).all()
    for row, number, closed_at in rows:
        reason = "the device was revoked"
        if closed_at is not None:
            reason = f"round {number} closed at {closed_at:%Y-%m-%d %H:%M:%S}Z and the device had not delivered"
        move(session, row, AssignmentStatus.LOST, now=now, reason=reason, values={"reason": reason})
    return len(rows)


def _round(session: Session, run: RunRow, row: RoundRow, now: datetime | None) -> Round:
    used_in = aliased(RoundRow)
    devices = session.execute(
        select(AssignmentRow, DeviceRow.name, used_in.number)
        .join(DeviceRow, DeviceRow.id == AssignmentRow.device_id)
        .outerjoin(used_in, used_in.id == AssignmentRow.used_in_round_id)
        .where(AssignmentRow.round_id == row.id)
        .order_by(AssignmentRow.device_id)
        .execution_options(populate_existing=True)
    )
    reason, waits = waiting.of_round(session, run, row, now)
    return Round(
        round_id=row.id,
        run_id=row.run_id,
        number=row.number,
        attempt=row.attempt,
        status=row.status,
        status_reason=reason,
        waiting=waits,
        base_version=row.base_version,
        devices=[_device(assignment, name, later) for assignment, name, later in devices],
        metrics=row.metrics,
        opened_at=row.opened_at,
        deadline_at=row.deadline_at,
        finished_at=row.finished_at,
    )


def _device(row: AssignmentRow, name: str, used_in_round: int | None) -> RoundDevice:
    return RoundDevice(
        assignment_id=row.id,
        device_id=row.device_id,
        device_name=name,
        status=row.status,
        reason=row.reason,
        stage=row.stage,
        step=row.step,
        steps=row.steps,
        losses=row.losses,
        num_examples=row.num_examples,
        metrics=row.metrics,
        offered_at=row.offered_at,
        submitted_at=row.submitted_at,
        late=row.late_use is not None,
        used_in_round=used_in_round,
        staleness=row.staleness,
    )
