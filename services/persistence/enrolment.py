"""How a device gets its identity, and how it proves it. Tokens and credentials are kept as hashes only.

A credential is replaced in two steps, so that a crash on either side loses nothing: the server remembers the next one
beside the present one, and drops the present one when the next one is first used, which shows that the device has it.
"""

import hmac
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import CursorResult, bindparam, select, update
from sqlalchemy.orm import Session

from persistence import events, federations, paging
from persistence.identifiers import new_id, new_secret, sha256_text
from persistence.tables import DeviceRow, EnrolmentTokenRow
from protocol.devices import (
    DeviceCredential,
    EnrolmentReceipt,
    EnrolmentRequest,
    EnrolmentToken,
    EnrolmentTokenCreate,
    EnrolmentTokenState,
)
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.pages import Page
from protocol.statuses import DeviceStatus

_CREDENTIALS = select(  # put together once, like the statements of `persistence.assignments`
    DeviceRow.credential_sha256, DeviceRow.next_credential_sha256, DeviceRow.public_key, DeviceRow.status
).where(DeviceRow.id == bindparam("device_id"))


@dataclass(frozen=True)
class DeviceIdentity:
    """Who a credential belongs to."""

    device_id: str
    public_key: str | None
    """Ed25519, base64; with it every request must be signed."""
    next_credential_sha256: str | None
    """The hash of the credential that came, if it is the one that shall replace the present one."""


def create_token(session: Session, request: EnrolmentTokenCreate, now: datetime) -> EnrolmentToken:
    """Create a token. The secret in the answer is nowhere else. Raises DomainError FEDERATION_NOT_FOUND."""
    federations.check_names(session, request.federations)
    secret = new_secret()
    row = EnrolmentTokenRow(
        id=new_id("tok", now),
        token_sha256=sha256_text(secret),
        uses=request.uses,
        used=0,
        note=request.note,
        approval=request.approval,
        federations=request.federations,
        created_at=now,
        expires_at=now + timedelta(seconds=request.expires_in_seconds),
    )
    session.add(row)
    return EnrolmentToken(
        token_id=row.id, token=secret, uses=row.uses, expires_at=row.expires_at, approval=row.approval
    )


def list_tokens(session: Session, *, cursor: str | None = None, limit: int = 50) -> Page[EnrolmentTokenState]:
    """Return tokens, the newest first, also those that are spent, expired or revoked.

    Raises:
        DomainError: INVALID_FIELD (the cursor).
    """
    query = select(EnrolmentTokenRow).order_by(EnrolmentTokenRow.id.desc())
    if cursor is not None:
        query = query.where(EnrolmentTokenRow.id < paging.id_cursor(cursor, "tok"))
    rows, more = paging.take(session, query, limit)
    return Page[EnrolmentTokenState](
        items=[_token_state(row) for row in rows], next_cursor=rows[-1].id if more else None
    )


def revoke_token(session: Session, token_id: str, now: datetime) -> EnrolmentTokenState:
    """Let nobody enrol with a token any more; who has enrolled stays. Again: no change.

    Raises:
        DomainError: ENROLMENT_TOKEN_NOT_FOUND.
    """
    table = EnrolmentTokenRow
    statement = update(table).where(table.id == token_id, table.revoked_at.is_(None)).values(revoked_at=now)
    session.execute(statement, execution_options={"synchronize_session": False})
    row = session.get(table, token_id, populate_existing=True)
    if row is None:
        raise DomainError(ErrorCode.ENROLMENT_TOKEN_NOT_FOUND, f"no enrolment token {token_id!r}", received=token_id)
    return _token_state(row)


def enrol(session: Session, request: EnrolmentRequest, now: datetime) -> EnrolmentReceipt:
    """Use the token once and register the device in its federations; it waits as `pending` where that is asked for.

    Raises:
        DomainError: ENROLMENT_TOKEN_UNKNOWN, ENROLMENT_TOKEN_REVOKED, ENROLMENT_TOKEN_EXPIRED or ENROLMENT_TOKEN_USED.
    """
    token = _use_token(session, sha256_text(request.token), now)
    secret = new_secret()
    device = DeviceRow(
        id=new_id("dev", now),
        name=request.name,
        status=DeviceStatus.PENDING if token.approval else DeviceStatus.REGISTERED,
        credential_sha256=sha256_text(secret),
        public_key=request.public_key,
        token_id=token.id,
        profile=request.profile.model_dump(mode="json"),
        activity="idle",
        enrolled_at=now,
        last_seen_at=now,
    )
    session.add(device)
    session.flush()
    federations.join_all(session, token.federations, device.id, now)
    data = {"name": device.name, "status": device.status.value}
    events.append(session, EventType.DEVICE_ENROLLED, now, device_id=device.id, data=data)
    return EnrolmentReceipt(device_id=device.id, credential=f"{device.id}.{secret}", status=device.status)


def _use_token(session: Session, token_sha256: str, now: datetime) -> EnrolmentTokenRow:
    table = EnrolmentTokenRow
    good = (table.used < table.uses, table.expires_at > now, table.revoked_at.is_(None))
    statement = update(table).where(table.token_sha256 == token_sha256, *good).values(used=table.used + 1)
    result = session.execute(statement, execution_options={"synchronize_session": False})
    assert isinstance(result, CursorResult)
    row = session.scalar(select(table).where(table.token_sha256 == token_sha256))
    if row is None:
        raise DomainError(ErrorCode.ENROLMENT_TOKEN_UNKNOWN, "no enrolment token is equal to the one that came")
    if result.rowcount == 1:
        return row
    if row.revoked_at is not None:
        detail = f"the enrolment token was revoked at {row.revoked_at.isoformat()}; ask the operator for a new one"
        raise DomainError(ErrorCode.ENROLMENT_TOKEN_REVOKED, detail, received=row.revoked_at.isoformat())
    if row.expires_at <= now:
        detail = f"the enrolment token expired at {row.expires_at.isoformat()}; ask the operator for a new one"
        raise DomainError(ErrorCode.ENROLMENT_TOKEN_EXPIRED, detail, received=row.expires_at.isoformat())
    detail = (
        f"the enrolment token was good for {row.uses} and was used {row.used} times; ask the operator for a new one"
    )
    raise DomainError(ErrorCode.ENROLMENT_TOKEN_USED, detail, expected=row.uses, received=row.used)


def authenticate(session: Session, credential: str) -> DeviceIdentity:
    """Return whom the credential, `<device_id>.<secret>`, belongs to. One statement, which only reads.

    A device that still waits for approval is let in: what it may not do is refused where it asks for it.

    Raises:
        DomainError: UNAUTHENTICATED or DEVICE_REVOKED.
    """
    device_id, _, secret = credential.partition(".")
    if not (device_id.isascii() and device_id.isprintable()):  # Not every database can be asked for any text.
        device_id = ""
    known = session.execute(_CREDENTIALS, {"device_id": device_id}).first()
    # The comparisons happen also for an unknown device, so that the time taken tells nothing.
    nothing, came = sha256_text(""), sha256_text(secret)
    is_present = hmac.compare_digest(known.credential_sha256 if known else nothing, came)
    is_next = hmac.compare_digest((known and known.next_credential_sha256) or nothing, came) and secret != ""
    if known is None or not (is_present or is_next):
        raise DomainError(ErrorCode.UNAUTHENTICATED, "expected the credential of an enrolled device, got another one")
    if known.status is DeviceStatus.REVOKED:
        raise DomainError(ErrorCode.DEVICE_REVOKED, f"device {device_id} was revoked by an operator")
    return DeviceIdentity(device_id, known.public_key, came if is_next else None)


def offer_credential(session: Session, device_id: str) -> DeviceCredential:
    """Make the credential that shall replace the device's present one, which stays good until this one is used.

    Asked again before that, it makes another: an answer that was lost leaves nothing that opens anything.
    """
    secret = new_secret()
    statement = update(DeviceRow).where(DeviceRow.id == device_id).values(next_credential_sha256=sha256_text(secret))
    session.execute(statement, execution_options={"synchronize_session": False})
    return DeviceCredential(device_id=device_id, credential=f"{device_id}.{secret}")


def adopt_credential(session: Session, identity: DeviceIdentity) -> None:
    """Void the credential before the one that came, if that is the next one. It was used: the device has it."""
    came = identity.next_credential_sha256
    if came is None:
        return
    table = DeviceRow
    statement = (
        update(table)
        .where(table.id == identity.device_id, table.next_credential_sha256 == came)
        .values(credential_sha256=came, next_credential_sha256=None)
    )
    session.execute(statement, execution_options={"synchronize_session": False})


def _token_state(row: EnrolmentTokenRow) -> EnrolmentTokenState:
    return EnrolmentTokenState(
        token_id=row.id,
        note=row.note,
        uses=row.uses,
        used=row.used,
        approval=row.approval,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
