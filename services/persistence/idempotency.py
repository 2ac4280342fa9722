"""Answers that a repeated POST gets again.

`Idempotency-Key` as in the IETF draft (draft-ietf-httpapi-idempotency-key-header). The row is claimed before the work
and filled after it, in the transaction of the work: what was done has an answer on record, and what was rolled back has
none. A second request with the same key waits for the first one's transaction at the claim.

Answers may hold secrets (a new device's credential) and are therefore sealed with a key made from the caller's own
request, which the database does not hold.

A caller may have so many of them and no more: a new key beyond that is refused before anything is done. Rejected: to
drop the oldest, since that would break the promise just where it counts, in a client that repeats much.
"""

import base64
import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography.fernet import Fernet
from sqlalchemy import CursorResult, delete, select, update
from sqlalchemy.orm import Session

from persistence.inserting import insert_or_keep
from persistence.operator_tables import IdempotentAnswerRow
from protocol.errors import DomainError, ErrorCode

_REPLAYED = "cotune_replayed"

KEPT = timedelta(hours=24)
"""So long after the request its repetition gets the same answer."""

FORGOTTEN_AT_ONCE = 10_000
"""Rows of one sweep: after days without one, its transaction must not keep SQLite's other writers waiting."""


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

    @property
    def caller_sha256(self) -> str | None:
        """Whose answers are counted together; None without a credential: a device that enrols, once a token's use.

        A device stays the same one with its next credential, `<device_id>.<secret>`, and does not begin anew.
        """
        who = self.caller.partition(" ")[2].strip().partition(".")[0]
        return _sha256(b"caller", who.encode()).hex() if who else None

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
    values = {
        "id": request.row_id,
        "caller_sha256": request.caller_sha256,
        "request_sha256": request.content_sha256,
        "created_at": now,
    }
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


def seconds_until_room(session: Session, request: KeyedRequest, most: int, now: datetime) -> float:
    """Return in how many seconds the caller of a claimed request has room for it; 0: it has.

    Requests at the same time do not see one another, so a few more than `most` may pass.
    """
    if request.caller_sha256 is None:
        return 0.0
    newest_first = (
        select(IdempotentAnswerRow.created_at)
        .where(IdempotentAnswerRow.caller_sha256 == request.caller_sha256, IdempotentAnswerRow.created_at > now - KEPT)
        .order_by(IdempotentAnswerRow.created_at.desc())
    )
    # With the claimed one, the caller has one too many until this one is forgotten.
    in_the_way = session.scalar(newest_first.offset(most).limit(1))
    return 0.0 if in_the_way is None else (in_the_way + KEPT - now).total_seconds()


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
    """Drop answers that are older than `KEPT`, the oldest first and `FORGOTTEN_AT_ONCE` at most; return how many."""
    old = (
        select(IdempotentAnswerRow.id)
        .where(IdempotentAnswerRow.created_at < now - KEPT)
        .order_by(IdempotentAnswerRow.created_at)
        .limit(FORGOTTEN_AT_ONCE)
    )
    result = session.execute(
        delete(IdempotentAnswerRow).where(IdempotentAnswerRow.id.in_(old)),
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
