"""Operators' API keys. Kept as hashes only; a key is found by its hash, so that looking it up tells nothing of it."""

from datetime import datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from persistence import paging
from persistence.identifiers import new_id, new_secret, sha256_text
from persistence.operator_tables import OperatorKeyRow
from protocol.errors import DomainError, ErrorCode
from protocol.operators import OperatorKey, OperatorKeyCreate, OperatorKeyCreated
from protocol.pages import Page

KEY_PREFIX = "cok_"
"""How every operator's key begins ("Cotune operator key"): a key that leaks can be searched for."""

PREFIX_LENGTH = 12
"""Characters of a key that are shown: `KEY_PREFIX` and 48 of its 256 random bits."""


def create_key(session: Session, request: OperatorKeyCreate, created_by: str, now: datetime) -> OperatorKeyCreated:
    """Create a key. The secret in the answer is nowhere else.

    Args:
        created_by: id of the key that asks for it.
    """
    key = KEY_PREFIX + new_secret()
    lifetime = request.expires_in_seconds
    row = OperatorKeyRow(
        id=new_id("key", now),
        name=request.name,
        role=request.role,
        prefix=key[:PREFIX_LENGTH],
        key_sha256=sha256_text(key),
        created_at=now,
        created_by=created_by,
        expires_at=None if lifetime is None else now + timedelta(seconds=lifetime),
    )
    session.add(row)
    return OperatorKeyCreated(**_key(row).model_dump(), key=key)


def list_keys(session: Session, *, cursor: str | None = None, limit: int = 50) -> Page[OperatorKey]:
    """Return every key, also those that are void, in the order of their creation.

    Raises:
        DomainError: INVALID_FIELD (the cursor).
    """
    query = select(OperatorKeyRow).order_by(OperatorKeyRow.id)
    if cursor is not None:
        query = query.where(OperatorKeyRow.id > paging.id_cursor(cursor, "key"))
    rows, more = paging.take(session, query, limit)
    return Page[OperatorKey](items=[_key(row) for row in rows], next_cursor=rows[-1].id if more else None)


def revoke_key(session: Session, key_id: str, now: datetime) -> OperatorKey:
    """Void a key for ever. Again: no change. Raises DomainError OPERATOR_KEY_NOT_FOUND."""
    statement = (
        update(OperatorKeyRow)
        .where(OperatorKeyRow.id == key_id, OperatorKeyRow.revoked_at.is_(None))
        .values(revoked_at=now)
    )
    session.execute(statement, execution_options={"synchronize_session": False})
    row = session.get(OperatorKeyRow, key_id, populate_existing=True)
    if row is None:
        raise DomainError(ErrorCode.OPERATOR_KEY_NOT_FOUND, f"no operator's key {key_id!r}", received=key_id)
    return _key(row)


def authenticate(session: Session, key: str, now: datetime) -> OperatorKey:
    """Return the key whose secret this is. One statement.

    Raises:
        DomainError: UNAUTHENTICATED; unknown, expired or revoked, and the message says which.
    """
    row = session.scalar(select(OperatorKeyRow).where(OperatorKeyRow.key_sha256 == sha256_text(key)))
    if row is None:
        raise DomainError(ErrorCode.UNAUTHENTICATED, "expected an operator key, got one that this server does not know")
    if row.revoked_at is not None:
        detail = f"the operator key {row.prefix}… was revoked at {row.revoked_at.isoformat()}"
        raise DomainError(ErrorCode.UNAUTHENTICATED, detail)
    if row.expires_at is not None and row.expires_at <= now:
        detail = f"the operator key {row.prefix}… expired at {row.expires_at.isoformat()}"
        raise DomainError(ErrorCode.UNAUTHENTICATED, detail)
    return _key(row)


def _key(row: OperatorKeyRow) -> OperatorKey:
    return OperatorKey(
        key_id=row.id,
        name=row.name,
        role=row.role,
        prefix=row.prefix,
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
