"""What endpoints ask for: the cloud, a session, the time, and who calls.

A session's transaction is committed when the endpoint has returned and before the answer is sent (`scope="function"`):
a commit that fails is an error answer. Measured with FastAPI 0.165: without that scope the client would get 200.

What an operator changes is entered in the audit trail by the same transaction; no endpoint has to think of it.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any

from fastapi import Depends, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from cloud_api.access import access_of
from cloud_api.authentication import Operator, Presented, authenticate_device, authenticate_operator
from cloud_api.cloud import Cloud
from cloud_api.signatures import parts_of
from persistence import audit
from persistence.idempotency import was_replayed
from protocol.errors import DomainError, ErrorCode

_operator_scheme = HTTPBearer(
    scheme_name="operator key",
    description="An operator's API key; the first one is `COTUNE_OPERATOR_KEY`, or the content of `operator.key` in the"
    " service's home.",
    auto_error=False,
)
_device_scheme = HTTPBearer(
    scheme_name="device credential",
    description="A device's credential from its enrolment, `<device_id>.<secret>`. A device with a public key also"
    " signs each request (RFC 9421).",
    auto_error=False,
)


def get_cloud(request: Request) -> Cloud:
    """Return this process's cloud."""
    cloud = request.app.state.cloud
    assert isinstance(cloud, Cloud)
    return cloud


async def _cloud(request: Request) -> Cloud:
    return get_cloud(request)


CloudHere = Annotated[Cloud, Depends(_cloud)]


# A dependency of a dependency is solved again for each that asks for it, so those below ask for the request only.
async def _now(request: Request) -> datetime:
    return get_cloud(request).now()


Now = Annotated[datetime, Depends(_now)]


def address_of(request: Request) -> str:
    """Return where a request comes from; behind a trusted proxy, what that says."""
    return request.client.host if request.client else "unknown"


def _presented(request: Request, bearer: HTTPAuthorizationCredentials | None) -> Presented:
    return Presented(bearer.credentials if bearer else None, address_of(request), parts_of(request))


OperatorBearer = Annotated[HTTPAuthorizationCredentials | None, Security(_operator_scheme)]
DeviceBearer = Annotated[HTTPAuthorizationCredentials | None, Security(_device_scheme)]


async def _operator_presented(request: Request, bearer: OperatorBearer) -> Presented:
    return _presented(request, bearer)


async def _device_presented(request: Request, bearer: DeviceBearer) -> Presented:
    return _presented(request, bearer)


async def _either_presented(request: Request, operator: OperatorBearer, device: DeviceBearer) -> Presented:
    return _presented(request, operator or device)


OperatorKey = Annotated[Presented, Depends(_operator_presented)]
DeviceKey = Annotated[Presented, Depends(_device_presented)]
EitherKey = Annotated[Presented, Depends(_either_presented)]


@dataclass
class AuditNote:
    """What the audit trail is told about the current request. An endpoint that makes something names it here."""

    subject: str | None
    data: dict[str, Any] = field(default_factory=dict)
    operator: Operator | None = None


def _note_of(request: Request) -> AuditNote:
    note = getattr(request.state, "audit_note", None)
    if note is None:
        note = AuditNote("/".join(map(str, request.path_params.values()))[: audit.LONGEST_SUBJECT] or None)
        request.state.audit_note = note
    assert isinstance(note, AuditNote)
    return note


async def _note(request: Request) -> AuditNote:
    return _note_of(request)


Note = Annotated[AuditNote, Depends(_note)]


def _deed(request: Request, note: AuditNote) -> audit.Deed | None:
    """Return what to record; None for what devices do, and for what changes nothing."""
    action, operator = access_of(request).action, note.operator
    if action is None or operator is None:
        return None
    request_id = request.scope.get("cotune_request_id", "")
    return audit.Deed(operator.key_id, operator.name, action, note.subject, request_id, note.data)


async def _record_refusal(request: Request, cloud: Cloud, note: AuditNote, code: ErrorCode) -> None:
    deed = _deed(request, note)
    if deed is not None and code is not ErrorCode.UNAVAILABLE:  # then the database would not take this either
        await cloud.transactions.write(lambda session: audit.record(session, deed, code.value, cloud.now()))


async def _writing(request: Request) -> AsyncIterator[Session]:
    cloud, note = get_cloud(request), _note_of(request)
    try:
        async with cloud.transactions.writing() as session:
            yield session
            if (deed := _deed(request, note)) is not None and not was_replayed(session):
                audit.record(session, deed, audit.DONE, cloud.now())
    except DomainError as error:
        await _record_refusal(request, cloud, note, error.code)
        raise


async def _reading(request: Request) -> AsyncIterator[Session]:
    async with get_cloud(request).transactions.reading() as session:
        yield session


WriteSession = Annotated[Session, Depends(_writing, scope="function")]
ReadSession = Annotated[Session, Depends(_reading, scope="function")]


async def _operator(request: Request, presented: OperatorKey) -> Operator:
    cloud, note = get_cloud(request), _note_of(request)
    operator = await cloud.read(lambda session: authenticate_operator(session, cloud, presented))
    note.operator = operator
    needed = access_of(request).role
    if needed is None or not operator.role.includes(needed):
        await _record_refusal(request, cloud, note, ErrorCode.FORBIDDEN)
        detail = f"expected an operator key with the role {needed}, got one with the role {operator.role}"
        raise DomainError(ErrorCode.FORBIDDEN, detail, expected=needed, received=operator.role)
    return operator


OperatorOnly = Depends(_operator)
"""Put it into an endpoint's `dependencies`. Which role the operation needs is said in `cloud_api.access`."""

OperatorHere = Annotated[Operator, Depends(_operator)]
"""The operator who calls, where an endpoint has to know."""


def _device(request: Request, session: WriteSession, presented: DeviceKey) -> str:
    return authenticate_device(session, get_cloud(request), presented)


DeviceId = Annotated[str, Depends(_device)]
"""The calling device, authenticated in the endpoint's own transaction: a revocation counts at once."""


def _limited_enrolment(request: Request, cloud: CloudHere) -> None:
    cloud.limits.enrolment(address_of(request))


LimitedEnrolment = Depends(_limited_enrolment)
"""Counts the request as an enrolment of its address."""


async def _body_bytes(request: Request) -> int:
    return len(await request.body())


BodyBytes = Annotated[int, Depends(_body_bytes)]
"""Size of the request's body, for the count of what crossed the network."""

Cursor = Annotated[
    str | None, Query(max_length=200, description="`next_cursor` of the page before; absent for the first page.")
]
Limit = Annotated[int, Query(ge=1, le=200, description="Most items on the page.")]
