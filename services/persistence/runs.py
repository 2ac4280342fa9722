"""Runs: create, show, stop, fail. What else an operator does with one is in `persistence.run_moves`."""

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from persistence import events, federations, jobs, paging, waiting
from persistence.identifiers import new_id
from persistence.run_config import config_of
from persistence.run_endings import end_run, lock_run, run_not_found
from persistence.tables import DeviceRow, FederationDeviceRow, RunRow
from persistence.transitions import UNFINISHED_RUN
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.pages import Page
from protocol.runs import Run, RunCreate
from protocol.statuses import DeviceStatus, JobKind, RoundStatus, RunStatus


def create_run(session: Session, request: RunCreate, now: datetime) -> Run:
    """Create a run and queue its preparation.

    Raises:
        DomainError: FEDERATION_NOT_FOUND; DEVICE_NOT_FOUND, an id in `device_ids` is no device's of the federation, or
            a revoked one's; INVALID_FIELD, fewer devices than `min_updates`.
    """
    federations.find(session, request.federation, keep=True)
    _check_devices(session, request)
    run = RunRow(
        id=new_id("run", now),
        name=request.name,
        federation=request.federation,
        status=RunStatus.PENDING,
        config=request.model_dump(mode="json"),
        device_ids=request.device_ids,
        max_updates=request.max_updates,
        current_round=0,
        created_at=now,
    )
    session.add(run)
    session.flush()
    data = {"name": run.name, "strategy": request.strategy.name, "rounds": request.rounds}
    events.append(session, EventType.RUN_CREATED, now, run_id=run.id, data=data)
    jobs.queue(session, JobKind.PREPARE_RUN, run.id, None, now)
    return _run(session, run, now)


def get_run(session: Session, run_id: str, now: datetime | None = None) -> Run:
    """Return a run. Raises DomainError RUN_NOT_FOUND.

    Args:
        now: without it, a worker whose lease has run out is taken for one that works.
    """
    return _run(session, find_run(session, run_id), now)


def list_runs(
    session: Session,
    *,
    cursor: str | None = None,
    limit: int = 50,
    status: RunStatus | None = None,
    federation: str | None = None,
    now: datetime | None = None,
) -> Page[Run]:
    """Return runs, the newest first; of one status or federation, if one is given.

    Raises:
        DomainError: INVALID_FIELD (the cursor).
    """
    query = select(RunRow).order_by(RunRow.id.desc())
    if cursor is not None:
        query = query.where(RunRow.id < paging.id_cursor(cursor, "run"))
    if status is not None:
        query = query.where(RunRow.status == status)
    if federation is not None:
        query = query.where(RunRow.federation == federation)
    rows, more = paging.take(session, query, limit)
    return Page[Run](items=[_run(session, row, now) for row in rows], next_cursor=rows[-1].id if more else None)


def stop_run(session: Session, run_id: str, reason: str, now: datetime) -> Run:
    """End a run at an operator's wish: its round is abandoned, its jobs are dropped. A stopped run stays as it is.

    Raises:
        DomainError: RUN_NOT_FOUND; ILLEGAL_TRANSITION, it has completed or failed.
    """
    run = lock_run(session, run_id)
    if run.status is not RunStatus.STOPPED:
        end_run(
            session,
            run,
            to=RunStatus.STOPPED,
            round_to=RoundStatus.ABANDONED,
            code=None,
            reason=reason,
            now=now,
        )
    return _run(session, run, now)


def fail_run(session: Session, run_id: str, code: ErrorCode, reason: str, now: datetime) -> None:
    """End a run that cannot go on. A run that has ended already stays as it is.

    Raises:
        DomainError: RUN_NOT_FOUND.
    """
    run = lock_run(session, run_id)
    if run.status in UNFINISHED_RUN:
        end_run(session, run, to=RunStatus.FAILED, round_to=RoundStatus.FAILED, code=code, reason=reason, now=now)


def find_run(session: Session, run_id: str) -> RunRow:
    """Return a run's row as it is now. Raises DomainError RUN_NOT_FOUND."""
    row = session.get(RunRow, run_id, populate_existing=True)
    if row is None:
        raise run_not_found(run_id)
    return row


def _check_devices(session: Session, request: RunCreate) -> None:
    if request.device_ids is None:
        return
    wanted = set(request.device_ids)
    known = set(
        session.scalars(
            select(DeviceRow.id)
            .join(FederationDeviceRow, FederationDeviceRow.device_id == DeviceRow.id)
            .where(
                DeviceRow.id.in_(wanted),
                DeviceRow.status != DeviceStatus.REVOKED,
                FederationDeviceRow.federation == request.federation,
            )
        )
    )
    if unknown := sorted(wanted - known):
        where = f"enrolled in federation {request.federation!r}"
        detail = f"`device_ids` names devices that are not {where}: {', '.join(unknown[:10])}"
        raise DomainError(ErrorCode.DEVICE_NOT_FOUND, detail, received=unknown[:10])
    if len(wanted) < request.min_updates:
        detail = f"`min_updates` is {request.min_updates}, `device_ids` names {len(wanted)} devices"
        raise DomainError(ErrorCode.INVALID_FIELD, detail, expected=len(wanted), received=request.min_updates)


def _run(session: Session, row: RunRow, now: datetime | None) -> Run:
    reason, waits = waiting.of_run(session, row, now)
    return Run(
        run_id=row.id,
        name=row.name,
        status=row.status,
        status_reason=reason,
        waiting=waits,
        error_code=row.error_code,
        config=config_of(row),
        current_round=row.current_round,
        latest_version=row.latest_version,
        federation=row.federation,
        created_at=row.created_at,
        finished_at=row.finished_at,
    )
