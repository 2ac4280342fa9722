"""The append-only feed: one row a fact, written in the transaction that makes it true.

A reader that has seen sequence n asks for what came after. That is only right if sequences become visible in order,
which PostgreSQL does not promise by itself: of two open transactions the one with the larger number may commit first.
So events are kept until the end of their transaction, then numbered and committed under one lock. The lock is always
the last one taken; it cannot be part of a deadlock.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from persistence.tables import EventRow
from protocol.events import Event, EventType

_INSERT = insert(EventRow)
_PENDING = "cotune_pending_events"
_WRITTEN = "cotune_wrote_events"
_FEED_LOCK = 0x636F74756E65  # "cotune"; any number that no other lock of the database uses.
_LARGEST_SEQUENCE = 2**63 - 1


def append(
    session: Session,
    type: EventType,  # noqa: A002
    now: datetime,
    *,
    run_id: str | None = None,
    round_id: str | None = None,
    device_id: str | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Add an event to the session's transaction. It can be listed once that is committed."""
    row = {
        "type": type,
        "time": now,
        "run_id": run_id,
        "round_id": round_id,
        "device_id": device_id,
        "data": data or {},
    }
    session.info.setdefault(_PENDING, []).append(row)


def write_pending(session: Session) -> None:
    """Number and insert the transaction's events; called by `Database.transaction` just before it commits."""
    rows = session.info.pop(_PENDING, [])
    if not rows:
        return
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_FEED_LOCK)))
    session.execute(_INSERT, rows)
    session.info[_WRITTEN] = True


def were_written(session: Session) -> bool:
    """Return whether the session's transaction, which is committed, has added to the feed."""
    return bool(session.info.get(_WRITTEN))


def list_events(
    session: Session,
    *,
    run_id: str | None,
    after: int = 0,
    limit: int = 100,
    types: Sequence[EventType] | None = None,
) -> list[Event]:
    """Return at most `limit` events with a sequence above `after`, in order; of one run and of some types, or all."""
    query = select(EventRow).where(EventRow.sequence > min(after, _LARGEST_SEQUENCE))
    if run_id is not None:
        query = query.where(EventRow.run_id == run_id)
    if types is not None:
        query = query.where(EventRow.type.in_(types))
    rows = session.scalars(query.order_by(EventRow.sequence).limit(limit))
    return [
        Event(
            sequence=row.sequence,
            type=row.type,
            time=row.time,
            run_id=row.run_id,
            round_id=row.round_id,
            device_id=row.device_id,
            data=row.data,
        )
        for row in rows
    ]


def last_sequence(session: Session, *, run_id: str | None = None) -> int:
    """Return the newest event's sequence, 0 if there is none."""
    query = select(func.max(EventRow.sequence))
    if run_id is not None:
        query = query.where(EventRow.run_id == run_id)
    return session.scalar(query) or 0
