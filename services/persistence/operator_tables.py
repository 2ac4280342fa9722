"""The tables of operators: their keys, what they did, what they were answered, whom they have told of events, and which
of their controllers sweeps."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, ForeignKey, Index, Integer, LargeBinary, String, event
from sqlalchemy.orm import Mapped, mapped_column

from persistence.column_types import BigInt, FiniteJson, UtcDateTime, status_type
from persistence.table_base import ID, REASON, SHA256, Table
from protocol.operators import OperatorRole


class SweepRow(Table):
    """Whose turn it is to sweep: one row."""

    __tablename__ = "sweeps"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    owner: Mapped[str] = mapped_column(String(200))
    lease_until: Mapped[datetime] = mapped_column(UtcDateTime)
    swept_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class IdempotentAnswerRow(Table):
    """What a POST with an `Idempotency-Key` was answered: written in the transaction of what it did."""

    __tablename__ = "idempotent_answers"

    id: Mapped[str] = mapped_column(SHA256, primary_key=True)
    """SHA-256 over who called and the key."""
    request_sha256: Mapped[str] = mapped_column(SHA256)
    status: Mapped[int | None] = mapped_column(Integer)
    sealed_answer: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Encrypted with a key that only who repeats the request can make: an answer may hold a credential."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class WebhookRow(Table):
    """An address that is told of events, and up to which one it was."""

    __tablename__ = "webhooks"
    __table_args__ = (Index(None, "active", "due_at"),)

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    url: Mapped[str] = mapped_column(String(2000))
    secret: Mapped[str] = mapped_column(String(200))
    """In the clear: every delivery is signed with it."""
    types: Mapped[list[str] | None] = mapped_column(FiniteJson)
    run_id: Mapped[str | None] = mapped_column(ID, ForeignKey("runs.id"))
    note: Mapped[str] = mapped_column(String(200), default="")
    active: Mapped[bool] = mapped_column(Boolean)
    sequence: Mapped[int] = mapped_column(BigInteger)
    failures: Mapped[int] = mapped_column(Integer, default=0)
    failing_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_error: Mapped[str | None] = mapped_column(REASON)
    due_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """Not before then is it tried. A sender that has claimed it moves this on, so that no other takes it."""
    delivered_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class OperatorKeyRow(Table):
    """An operator's API key. Only its hash is kept, and its first characters to tell it from others."""

    __tablename__ = "operator_keys"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    role: Mapped[OperatorRole] = mapped_column(status_type(OperatorRole))
    prefix: Mapped[str] = mapped_column(String(16))
    key_sha256: Mapped[str] = mapped_column(SHA256, unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(ID)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class AuditRow(Table):
    """The append-only trail of what operators did. No row is ever changed or removed."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "key_id", "sequence"), Index(None, "subject", "sequence"))

    sequence: Mapped[int] = mapped_column(BigInt, primary_key=True)
    time: Mapped[datetime] = mapped_column(UtcDateTime)
    key_id: Mapped[str] = mapped_column(ID)
    name: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str | None] = mapped_column(String(200))
    outcome: Mapped[str] = mapped_column(String(64))
    request_id: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]] = mapped_column(FiniteJson, default=dict)


def _refuse_change(_mapper: object, _connection: object, row: AuditRow) -> None:
    raise AttributeError(f"the audit trail is append-only: entry {row.sequence} cannot be changed or removed")


for _change in ("before_update", "before_delete"):
    event.listen(AuditRow, _change, _refuse_change)
