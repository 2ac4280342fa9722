"""Devices as operators see them, their heartbeats, and what happens to silent or revoked ones."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from persistence import federations, paging, round_lifecycle
from persistence.tables import AssignmentRow, DeviceRow, FederationDeviceRow, RoundRow
from persistence.transitions import TAKES_UPDATES, UNDELIVERED, move
from protocol.devices import Device, DeviceProfile, Heartbeat
from protocol.errors import DomainError, ErrorCode
from protocol.pages import Page
from protocol.statuses import AssignmentStatus, DeviceStatus

TOUCH_AFTER_SECONDS = 5
"""A device that polls more often than this costs no write for being seen."""

_AT_ONCE = 1000
"""Ids in one statement."""


def record_heartbeat(session: Session, device_id: str, heartbeat: Heartbeat, now: datetime) -> None:
    """Remember that the device is alive and what it says about itself. One statement, two if it was offline."""
    values = {"last_seen_at": now, "activity": heartbeat.activity, "reason": heartbeat.reason}
    if heartbeat.profile is not None:
        values["profile"] = heartbeat.profile.model_dump(mode="json")
    statement = update(DeviceRow).where(DeviceRow.id == device_id).values(values).returning(DeviceRow.status)
    status = session.execute(statement, execution_options={"synchronize_session": False}).scalar()
    if status is None:
        raise _not_found(device_id)
    if status is DeviceStatus.OFFLINE:
        move(session, _row(session, device_id), DeviceStatus.REGISTERED, now=now, reason="it was heard from again")


def may_work(session: Session, device_id: str) -> DeviceRow:
    """Return the device's row if it may have work.

    Raises:
        DomainError: DEVICE_NOT_APPROVED, DEVICE_REVOKED or DEVICE_NOT_FOUND.
    """
    row = _row(session, device_id)
    if row.status is DeviceStatus.PENDING:
        detail = f"device {device_id} waits for an operator's approval"
        raise DomainError(ErrorCode.DEVICE_NOT_APPROVED, detail, expected="registered", received="pending")
    if row.status is DeviceStatus.REVOKED:
        raise DomainError(ErrorCode.DEVICE_REVOKED, f"device {device_id} was revoked by an operator")
    return row


def touch(session: Session, row: DeviceRow, now: datetime) -> None:
    """Remember that a device polled. No statement if it was seen in the last `TOUCH_AFTER_SECONDS`."""
    if row.status is DeviceStatus.OFFLINE:
        seen = {"last_seen_at": now}
        move(session, row, DeviceStatus.REGISTERED, now=now, reason="it was heard from again", values=seen)
    elif now - row.last_seen_at >= timedelta(seconds=TOUCH_AFTER_SECONDS):
        statement = update(DeviceRow).where(DeviceRow.id == row.id).values(last_seen_at=now)
        session.execute(statement, execution_options={"synchronize_session": False})


def touch_many(session: Session, device_ids: Sequence[str], now: datetime) -> None:
    """Remember that these devices polled. Those that are offline or revoked stay as they are."""
    for start in range(0, len(device_ids), _AT_ONCE):
        chosen = DeviceRow.id.in_(device_ids[start : start + _AT_ONCE])
        statement = update(DeviceRow).where(chosen, DeviceRow.status == DeviceStatus.REGISTERED)
        session.execute(statement.values(last_seen_at=now), execution_options={"synchronize_session": False})


def get_device(session: Session, device_id: str) -> Device:
    """Return a device. Raises DomainError DEVICE_NOT_FOUND."""
    return _device(session, _row(session, device_id))


def list_devices(
    session: Session,
    *,
    cursor: str | None = None,
    limit: int = 50,
    status: DeviceStatus | None = None,
    federation: str | None = None,
) -> Page[Device]:
    """Return devices in the order of their enrolment; of one status or federation, if one is given.

    Raises:
        DomainError: INVALID_FIELD (the cursor).
    """
    query = select(DeviceRow).order_by(DeviceRow.id)
    if cursor is not None:
        query = query.where(DeviceRow.id > paging.id_cursor(cursor, "dev"))
    if status is not None:
        query = query.where(DeviceRow.status == status)
    if federation is not None:
        query = query.join(FederationDeviceRow, FederationDeviceRow.device_id == DeviceRow.id)
        query = query.where(FederationDeviceRow.federation == federation)
    rows, more = paging.take(session, query, limit)
    belongs = federations.of_devices(session, [row.id for row in rows])
    items = [_shown(row, belongs[row.id]) for row in rows]
    return Page[Device](items=items, next_cursor=rows[-1].id if more else None)


def revoke_device(session: Session, device_id: str, now: datetime, reason: str = "revoked by an operator") -> Device:
    """Void the device's credential for ever; what is not being aggregated yet is not counted. Again: no change.

    Raises:
        DomainError: DEVICE_NOT_FOUND.
    """
    affected = session.execute(
        select(RoundRow.run_id, RoundRow.id)
        .join(AssignmentRow, AssignmentRow.round_id == RoundRow.id)
        .where(AssignmentRow.device_id == device_id, RoundRow.status.in_(TAKES_UPDATES))
    ).all()
    locked = [round_lifecycle.lock_round(session, round_id) for _, round_id in sorted(map(tuple, affected))]
    row = _row(session, device_id, lock=True)
    if row.status is DeviceStatus.REVOKED:
        return _device(session, row)
    move(session, row, DeviceStatus.REVOKED, now=now, reason=reason)
    for run, round_row in locked:
        if round_row.status in TAKES_UPDATES:
            _drop_update(session, round_row.id, device_id, now)
            round_lifecycle.settle(session, run, round_row, now)
    return _device(session, row)


def _drop_update(session: Session, round_id: str, device_id: str, now: datetime) -> None:
    reason = "the device was revoked"
    assignment = session.scalar(
        select(AssignmentRow)
        .where(AssignmentRow.round_id == round_id, AssignmentRow.device_id == device_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    if assignment is None:
        return
    if assignment.status in UNDELIVERED:
        move(session, assignment, AssignmentStatus.LOST, now=now, reason=reason, values={"reason": reason})
    elif assignment.status is AssignmentStatus.SUBMITTED:
        move(session, assignment, AssignmentStatus.REJECTED, now=now, reason=reason, values={"reason": reason})


def approve_device(session: Session, device_id: str, now: datetime) -> Device:
    """Let a device that waits for it take part. Again: no change.

    Raises:
        DomainError: DEVICE_NOT_FOUND; ILLEGAL_TRANSITION, it was revoked.
    """
    row = _row(session, device_id, lock=True)
    if row.status in (DeviceStatus.PENDING, DeviceStatus.REVOKED):
        move(session, row, DeviceStatus.REGISTERED, now=now, reason="approved by an operator")
    return _device(session, row)


def mark_silent_devices(session: Session, now: datetime, offline_after_seconds: float) -> int:
    """Move registered devices that were not heard from for so long to offline; return how many."""
    limit = now - timedelta(seconds=offline_after_seconds)
    silent = session.scalars(
        select(DeviceRow)
        .where(DeviceRow.status == DeviceStatus.REGISTERED, DeviceRow.last_seen_at < limit)
        .order_by(DeviceRow.id)
        .with_for_update(skip_locked=True, key_share=True)
    ).all()
    for row in silent:
        reason = f"not heard from since {row.last_seen_at:%Y-%m-%d %H:%M:%S}Z"
        move(session, row, DeviceStatus.OFFLINE, now=now, reason=reason)
    return len(silent)


def _row(session: Session, device_id: str, *, lock: bool = False) -> DeviceRow:
    query = select(DeviceRow).where(DeviceRow.id == device_id).execution_options(populate_existing=True)
    row = session.scalar(query.with_for_update(key_share=True) if lock else query)
    if row is None:
        raise _not_found(device_id)
    return row


def _not_found(device_id: str) -> DomainError:
    return DomainError(ErrorCode.DEVICE_NOT_FOUND, f"no device {device_id!r}", received=device_id)


def _device(session: Session, row: DeviceRow) -> Device:
    return _shown(row, federations.of_devices(session, [row.id])[row.id])


def _shown(row: DeviceRow, belongs_to: list[str]) -> Device:
    return Device(
        device_id=row.id,
        name=row.name,
        status=row.status,
        profile=DeviceProfile.model_validate(row.profile),
        activity=row.activity,
        reason=row.reason,
        federations=belongs_to,
        enrolled_at=row.enrolled_at,
        last_seen_at=row.last_seen_at,
        public_key=row.public_key,
    )
