"""How a device gets its identity, and how it proves it. Tokens and credentials are kept as hashes only."""

import hmac
from datetime import datetime, timedelta

from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import Session

from persistence import events, federations
from persistence.identifiers import new_id, new_secret, sha256_text
from persistence.tables import DeviceRow, EnrolmentTokenRow
from protocol.devices import EnrolmentReceipt, EnrolmentRequest, EnrolmentToken, EnrolmentTokenCreate
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.statuses import DeviceStatus


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
        federations=request.federations,
        created_at=now,
        expires_at=now + timedelta(seconds=request.expires_in_seconds),
    )
    session.add(row)
    return EnrolmentToken(token_id=row.id, token=secret, uses=row.uses, expires_at=row.expires_at)


def enrol(session: Session, request: EnrolmentRequest, now: datetime) -> EnrolmentReceipt:
    """Use the token once, register the device, and put it into the token's federations.

    Raises:
        DomainError: ENROLMENT_TOKEN_UNKNOWN, ENROLMENT_TOKEN_EXPIRED or ENROLMENT_TOKEN_USED.
    """
    token = _use_token(session, sha256_text(request.token), now)
    secret = new_secret()
    device = DeviceRow(
        id=new_id("dev", now),
        name=request.name,
        status=DeviceStatus.REGISTERED,
        credential_sha256=sha256_text(secret),
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
    statement = (
        update(table)
        .where(table.token_sha256 == token_sha256, table.used < table.uses, table.expires_at > now)
        .values(used=table.used + 1)
    )
    result = session.execute(statement, execution_options={"synchronize_session": False})
    assert isinstance(result, CursorResult)
    row = session.scalar(select(table).where(table.token_sha256 == token_sha256))
    if row is None:
        raise DomainError(ErrorCode.ENROLMENT_TOKEN_UNKNOWN, "no enrolment token is equal to the one that came")
    if result.rowcount == 1:
        return row
    if row.expires_at <= now:
        detail = f"the enrolment token expired at {row.expires_at.isoformat()}; ask the operator for a new one"
        raise DomainError(ErrorCode.ENROLMENT_TOKEN_EXPIRED, detail, received=row.expires_at.isoformat())
    detail = (
        f"the enrolment token was good for {row.uses} and was used {row.used} times; ask the operator for a new one"
    )
    raise DomainError(ErrorCode.ENROLMENT_TOKEN_USED, detail, expected=row.uses, received=row.used)


def authenticate(session: Session, credential: str) -> str:
    """Return the id of the device that the credential, `<device_id>.<secret>`, belongs to. One statement.

    A device that still waits for approval is let in: what it may not do is refused where it asks for it.

    Raises:
        DomainError: UNAUTHENTICATED or DEVICE_REVOKED.
    """
    device_id, _, secret = credential.partition(".")
    if not (device_id.isascii() and device_id.isprintable()):  # Not every database can be asked for any text.
        device_id = ""
    known = session.execute(
        select(DeviceRow.credential_sha256, DeviceRow.status).where(DeviceRow.id == device_id)
    ).first()
    # The comparison happens also for an unknown device, so that the time taken tells nothing.
    expected = known.credential_sha256 if known else sha256_text("")
    if not hmac.compare_digest(expected, sha256_text(secret)) or known is None:
        raise DomainError(ErrorCode.UNAUTHENTICATED, "expected the credential of an enrolled device")
    if known.status is DeviceStatus.REVOKED:
        raise DomainError(ErrorCode.DEVICE_REVOKED, f"device {device_id} was revoked by an operator")
    return device_id
