"""Federations: which devices train together. A device may belong to several; a run belongs to one."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from sqlalchemy import CursorResult, delete, func, insert, select
from sqlalchemy.orm import Session

from persistence import events, paging
from persistence.inserting import insert_or_keep
from persistence.tables import DeviceRow, EnrolmentTokenRow, FederationDeviceRow, FederationRow, RunRow
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.federations import DEFAULT_FEDERATION, Federation, FederationChange, FederationCreate
from protocol.pages import Page
from protocol.statuses import DeviceStatus


def create_federation(session: Session, request: FederationCreate, now: datetime) -> Federation:
    """Create a federation without devices. Raises DomainError NAME_TAKEN."""
    values: dict[str, object] = {"name": request.name, "description": request.description, "created_at": now}
    if not insert_or_keep(session, FederationRow, values):
        raise DomainError(ErrorCode.NAME_TAKEN, f"there is a federation {request.name!r}", received=request.name)
    events.append(session, EventType.FEDERATION_CREATED, now, data={"federation": request.name})
    return get_federation(session, request.name)


def get_federation(session: Session, name: str) -> Federation:
    """Return a federation. Raises DomainError FEDERATION_NOT_FOUND."""
    return _federations(session, [find(session, name)])[0]


_NAME = "[a-z0-9][a-z0-9-]{0,63}"


def list_federations(session: Session, *, cursor: str | None = None, limit: int = 50) -> Page[Federation]:
    """Return federations in the order of their names.

    Raises:
        DomainError: INVALID_FIELD (the cursor).
    """
    query = select(FederationRow).order_by(FederationRow.name)
    if cursor is not None:
        query = query.where(FederationRow.name > paging.checked_cursor(cursor, _NAME))
    rows, more = paging.take(session, query, limit)
    return Page[Federation](items=_federations(session, rows), next_cursor=rows[-1].name if more else None)


def change_federation(session: Session, name: str, request: FederationChange) -> Federation:
    """Change what is said about a federation. Raises DomainError FEDERATION_NOT_FOUND."""
    find(session, name, keep=True).description = request.description
    session.flush()
    return get_federation(session, name)


def delete_federation(session: Session, name: str, now: datetime) -> None:
    """Delete a federation that never had a run; its devices stay in their other ones.

    Raises:
        DomainError: FEDERATION_NOT_FOUND; CONFLICT, it has runs, an enrolment token names it, or it is the default one.
    """
    row = find(session, name, delete=True)
    if name == DEFAULT_FEDERATION:
        raise DomainError(ErrorCode.CONFLICT, f"federation {name!r} is where devices and runs belong by default")
    runs = session.scalar(select(func.count()).select_from(RunRow).where(RunRow.federation == name))
    if runs:
        raise DomainError(ErrorCode.CONFLICT, f"federation {name!r} has {runs} runs", expected=0, received=runs)
    tokens = session.execute(
        select(EnrolmentTokenRow.id, EnrolmentTokenRow.federations).where(
            EnrolmentTokenRow.used < EnrolmentTokenRow.uses, EnrolmentTokenRow.expires_at > now
        )
    )
    if naming := [token for token, federations in tokens if name in federations]:
        detail = f"{len(naming)} enrolment tokens that can still be used name federation {name!r}"
        raise DomainError(ErrorCode.CONFLICT, detail, expected=0, received=len(naming))
    session.execute(delete(FederationDeviceRow).where(FederationDeviceRow.federation == name))
    session.delete(row)
    events.append(session, EventType.FEDERATION_DELETED, now, data={"federation": name})


def add_device(session: Session, name: str, device_id: str, now: datetime) -> None:
    """Let a device take part in a federation's runs. Again: no change.

    Raises:
        DomainError: FEDERATION_NOT_FOUND, DEVICE_NOT_FOUND.
    """
    find(session, name, keep=True)
    _check_device(session, device_id)
    if insert_or_keep(session, FederationDeviceRow, {"federation": name, "device_id": device_id, "joined_at": now}):
        data = {"federation": name}
        events.append(session, EventType.FEDERATION_DEVICE_ADDED, now, device_id=device_id, data=data)


def remove_device(session: Session, name: str, device_id: str, now: datetime) -> None:
    """Give a device no more work of a federation; what it is doing it may finish. Again: no change.

    Raises:
        DomainError: FEDERATION_NOT_FOUND, DEVICE_NOT_FOUND.
    """
    find(session, name)
    _check_device(session, device_id)
    table = FederationDeviceRow
    result = session.execute(delete(table).where(table.federation == name, table.device_id == device_id))
    assert isinstance(result, CursorResult)
    if result.rowcount:
        data = {"federation": name}
        events.append(session, EventType.FEDERATION_DEVICE_REMOVED, now, device_id=device_id, data=data)


def join_all(session: Session, names: Iterable[str], device_id: str, now: datetime) -> None:
    """Put a device that has just enrolled into the federations of its token; one deleted since is left out."""
    query = select(FederationRow.name).where(FederationRow.name.in_(set(names)))
    there = session.scalars(query.with_for_update(read=True, key_share=True)).all()
    rows = [{"federation": name, "device_id": device_id, "joined_at": now} for name in sorted(there)]
    if rows:
        session.execute(insert(FederationDeviceRow), rows)


def of_devices(session: Session, device_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the federations of each device, in the order of their names."""
    found: dict[str, list[str]] = {device_id: [] for device_id in device_ids}
    table = FederationDeviceRow
    query = select(table.device_id, table.federation).where(table.device_id.in_(device_ids)).order_by(table.federation)
    for device_id, name in session.execute(query):
        found[device_id].append(name)
    return found


def find(session: Session, name: str, *, keep: bool = False, delete: bool = False) -> FederationRow:
    """Return a federation's row.

    Args:
        keep: nobody may delete it until the transaction ends.
        delete: nobody may put anything into it until then.

    Raises:
        DomainError: FEDERATION_NOT_FOUND.
    """
    query = select(FederationRow).where(FederationRow.name == name).execution_options(populate_existing=True)
    if keep or delete:
        query = query.with_for_update(read=keep, key_share=keep)
    row = session.scalar(query)
    if row is None:
        raise DomainError(ErrorCode.FEDERATION_NOT_FOUND, f"no federation {name!r}", received=name)
    return row


def check_names(session: Session, names: Iterable[str]) -> None:
    """Raise DomainError FEDERATION_NOT_FOUND unless each is there."""
    for name in sorted(set(names)):
        find(session, name)


def _check_device(session: Session, device_id: str) -> None:
    if session.get(DeviceRow, device_id) is None:
        raise DomainError(ErrorCode.DEVICE_NOT_FOUND, f"no device {device_id!r}", received=device_id)


def _federations(session: Session, rows: Sequence[FederationRow]) -> list[Federation]:
    names = [row.name for row in rows]
    members = (
        select(FederationDeviceRow.federation, func.count())
        .join(DeviceRow, DeviceRow.id == FederationDeviceRow.device_id)
        .where(FederationDeviceRow.federation.in_(names), DeviceRow.status != DeviceStatus.REVOKED)
        .group_by(FederationDeviceRow.federation)
    )
    runs = select(RunRow.federation, func.count()).where(RunRow.federation.in_(names)).group_by(RunRow.federation)
    num_devices = dict(session.execute(members).all())
    num_runs = dict(session.execute(runs).all())
    return [
        Federation(
            name=row.name,
            description=row.description,
            num_devices=num_devices.get(row.name, 0),
            num_runs=num_runs.get(row.name, 0),
            created_at=row.created_at,
        )
        for row in rows
    ]
