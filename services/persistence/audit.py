"""The audit trail: who did what to what, when, and how it ended. Entries are added and read, never changed.

What was done is recorded in the transaction that does it: neither is there without the other. What was refused is
recorded in a transaction of its own, as the refused one is rolled back.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from persistence import paging
from persistence.operator_tables import AuditRow
from protocol.errors import DomainError, ErrorCode
from protocol.operators import AuditEntry
from protocol.pages import Page

DONE = "done"
LONGEST_SUBJECT = 200


@dataclass(frozen=True)
class Deed:
    """What is recorded, but for its time and outcome."""

    key_id: str
    name: str
    action: str
    subject: str | None
    request_id: str
    data: dict[str, Any] = field(default_factory=dict)


def record(session: Session, deed: Deed, outcome: str, now: datetime) -> None:
    """Add an entry to the session's transaction. A NUL, which PostgreSQL cannot keep, is shown as `\\ufffd`."""
    subject = None if deed.subject is None else deed.subject.replace("\x00", "\ufffd")[:LONGEST_SUBJECT]
    row = AuditRow(
        time=now,
        key_id=deed.key_id,
        name=deed.name,
        action=deed.action,
        subject=subject,
        outcome=outcome,
        request_id=deed.request_id,
        data=deed.data,
    )
    session.add(row)


def list_entries(
    session: Session,
    *,
    cursor: str | None = None,
    limit: int = 50,
    key_id: str | None = None,
    action: str | None = None,
    subject: str | None = None,
) -> Page[AuditEntry]:
    """Return entries, the newest first, optionally those of one key, one action or one subject.

    Raises:
        DomainError: INVALID_FIELD, the cursor is none of ours.
    """
    query = select(AuditRow).order_by(AuditRow.sequence.desc())
    if cursor is not None:
        query = query.where(AuditRow.sequence < _sequence(cursor))
    wanted = ((AuditRow.key_id, key_id), (AuditRow.action, action), (AuditRow.subject, subject))
    for column, value in wanted:
        if value is not None:
            query = query.where(column == value)
    rows, more = paging.take(session, query, limit)
    return Page[AuditEntry](items=[_entry(row) for row in rows], next_cursor=str(rows[-1].sequence) if more else None)


def _sequence(cursor: str) -> int:
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        detail = f"expected the `next_cursor` of the page before, got {cursor[:40]!r}"
        raise DomainError(ErrorCode.INVALID_FIELD, detail, received=cursor[:40])
    return int(cursor)


def _entry(row: AuditRow) -> AuditEntry:
    return AuditEntry(
        sequence=row.sequence,
        time=row.time,
        key_id=row.key_id,
        name=row.name,
        action=row.action,
        subject=row.subject,
        outcome=row.outcome,
        request_id=row.request_id,
        data=row.data,
    )
