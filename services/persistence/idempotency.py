"""Answers that a repeated POST gets again.

`Idempotency-Key` as in the IETF draft (draft-ietf-httpapi-idempotency-key-header). The row is claimed before the work
and filled after it, in the transaction of the work: what was done has an answer on record, and what was rolled back has
none. A second request with the same key waits for the first one's transaction at the claim.

Answers may hold secrets (a new device's credential) and are therefore sealed with a key made from the caller's own
request, which the database does not hold.
"""

import base64
import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography.fernet import Fernet
from sqlalchemy import CursorResult, delete, update
from sqlalchemy.orm import Session

from persistence.inserting import insert_or_keep
from persistence.operator_tables import IdempotentAnswerRow
from protocol.errors import DomainError, ErrorCode

_REPLAYED = "cotune_replayed"

KEPT = timedelta(hours=24)
"""So long after the request its repetition gets the same answer."""


@dataclass(frozen=True)
class Answer:
    """What the endpoint answered."""

    status: int
    body: bytes


@dataclass(frozen=True)
class KeyedRequest:
    """A request with an idempotency key.

    Attributes:
        caller: the credential it came with, empty without one.
        key: as the client chose it.
        content: method, path, query and body: what has to be the same for the same answer.
    """

    caller: str
    key: str
    content: bytes

    @property
    def row_id(self) -> str:
        """Under which the answer is kept: two callers may choose the same key."""
        return _sha256(b"row", self.caller.encode(), self.key.encode()).hex()

    @property
    def content_sha256(self) -> str:
        """What tells a repetition from another request."""
        return hashlib.sha256(self.content).hexdigest()

    def _seal(self) -> Fernet:
        secret = _sha256(b"seal", self.caller.encode(), self.key.encode(), self.content)
        return Fernet(base64.urlsafe_b64encode(secret))

    def seal(self, body: bytes) -> bytes:
        """Encrypt an answer's body."""
        return self._seal().encrypt(body)

    def open(self, sealed: bytes) -> bytes:
        """Decrypt it."""
        return self._seal().decrypt(sealed)


def claim(session: Session, request: KeyedRequest, now: datetime) -> Answer | None:
    """Return the answer that the same request got, or None: it is new, and the key is this transaction's.

    Raises:
        DomainError: IDEMPOTENCY_KEY_REUSED, another request came with this key.
    """
    values = {"id": request.row_id, "request_sha256": request.content_sha256, "created_at": now}
    if insert_or_keep(session, IdempotentAnswerRow, values):
        return None
    row = session.get_one(IdempotentAnswerRow, request.row_id, populate_existing=True)
    if row.request_sha256 != request.content_sha256:
        detail = "this `Idempotency-Key` came before with another request; a new request needs a new key"
        raise DomainError(
            ErrorCode.IDEMPOTENCY_KEY_REUSED, detail, expected=row.request_sha256, received=request.content_sha256
        )
    # A row is committed with its answer or not at all.
    assert row.status is not None
    assert row.sealed_answer is not None
    session.info[_REPLAYED] = True
    return Answer(row.status, request.open(row.sealed_answer))


def was_replayed(session: Session) -> bool:
    """Return whether the session only repeated an answer: then nothing was done in it."""
    return _REPLAYED in session.info


def release(session: Session, request: KeyedRequest) -> None:
    """Give a claimed key back: its transaction is committed and has no answer to keep."""
    session.execute(
        delete(IdempotentAnswerRow).where(IdempotentAnswerRow.id == request.row_id),
        execution_options={"synchronize_session": False},
    )


def record(session: Session, request: KeyedRequest, answer: Answer) -> None:
    """Keep the answer under the claimed key."""
    session.execute(
        update(IdempotentAnswerRow)
        .where(IdempotentAnswerRow.id == request.row_id)
        .values(status=answer.status, sealed_answer=request.seal(answer.body)),
        execution_options={"synchronize_session": False},
    )


def forget_old(session: Session, now: datetime) -> int:
    """Drop the answers that are older than `KEPT`; return how many."""
    result = session.execute(
        delete(IdempotentAnswerRow).where(IdempotentAnswerRow.created_at < now - KEPT),
        execution_options={"synchronize_session": False},
    )
    assert isinstance(result, CursorResult)
    return result.rowcount


def _sha256(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
