"""What endpoints ask for: the cloud, a session, the time, and who calls.

A session's transaction is committed when the endpoint has returned and before the answer is sent (`scope="function"`):
a commit that fails is an error answer. Measured with FastAPI 0.165: without that scope the client would get 200.
"""

import hmac
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import Depends, Query, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session

from cloud_api.cloud import Cloud
from cloud_api.problems import request_facts
from persistence import enrolment
from protocol.errors import DomainError, ErrorCode

_operator_scheme = HTTPBearer(
    scheme_name="operator key",
    description="The operator key: `COTUNE_OPERATOR_KEY`, or the content of `operator.key` in the service's home.",
    auto_error=False,
)
_device_scheme = HTTPBearer(
    scheme_name="device credential",
    description="A device's credential from its enrolment, `<device_id>.<secret>`.",
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


async def _now(cloud: CloudHere) -> datetime:
    return cloud.now()


Now = Annotated[datetime, Depends(_now)]


async def _writing(cloud: CloudHere) -> AsyncIterator[Session]:
    async with cloud.transactions.writing() as session:
        yield session
    cloud.feed.nudge()


async def _reading(cloud: CloudHere) -> AsyncIterator[Session]:
    async with cloud.transactions.reading() as session:
        yield session


WriteSession = Annotated[Session, Depends(_writing, scope="function")]
ReadSession = Annotated[Session, Depends(_reading, scope="function")]

OperatorKey = Annotated[HTTPAuthorizationCredentials | None, Security(_operator_scheme)]
DeviceKey = Annotated[HTTPAuthorizationCredentials | None, Security(_device_scheme)]


def is_operator_key(cloud: Cloud, key: str) -> bool:
    """Return whether `key` is the operator key. The time taken tells nothing about how much of it is right."""
    return hmac.compare_digest(key.encode("utf-8", "replace"), cloud.settings.operator_key.encode())


def unauthenticated(detail: str) -> DomainError:
    """Return the error for a request without a valid credential."""
    return DomainError(ErrorCode.UNAUTHENTICATED, detail)


async def _operator(cloud: CloudHere, bearer: OperatorKey) -> None:
    if bearer is None:
        raise unauthenticated("expected `Authorization: Bearer <operator key>`")
    if is_operator_key(cloud, bearer.credentials):
        return
    # A device's credential is a valid one of the wrong kind: 403. Anything else is 401.
    await cloud.read(lambda session: _authenticated_device(session, bearer.credentials, "the operator key"))
    raise DomainError(ErrorCode.FORBIDDEN, "expected the operator key, got a device's credential")


OperatorOnly = Depends(_operator)
"""Put it into an endpoint's `dependencies`."""


def authenticate_device(session: Session, cloud: Cloud, bearer: HTTPAuthorizationCredentials | None) -> str:
    """Return the id of the calling device. For work that runs in a thread.

    Raises:
        DomainError: UNAUTHENTICATED, DEVICE_REVOKED, or FORBIDDEN for the operator key.
    """
    if bearer is None:
        raise unauthenticated("expected `Authorization: Bearer <device credential>`")
    if is_operator_key(cloud, bearer.credentials):
        raise DomainError(ErrorCode.FORBIDDEN, "expected a device's credential, got the operator key")
    return _authenticated_device(session, bearer.credentials, "the credential of an enrolled device")


def _authenticated_device(session: Session, credential: str, expected: str) -> str:
    try:
        device_id = enrolment.authenticate(session, credential)
    except DomainError as error:
        if error.code is ErrorCode.UNAUTHENTICATED:
            raise unauthenticated(f"expected {expected}") from None
        raise
    request_facts.get()["device_id"] = device_id
    return device_id


def _device(session: WriteSession, cloud: CloudHere, bearer: DeviceKey) -> str:
    return authenticate_device(session, cloud, bearer)


DeviceId = Annotated[str, Depends(_device)]
"""The calling device, authenticated in the endpoint's own transaction: a revocation counts at once."""


@dataclass(frozen=True)
class Caller:
    """Who calls an operation that operators and devices may both use."""

    device_id: str | None
    """None: an operator."""


def authenticate_caller(session: Session, cloud: Cloud, bearer: HTTPAuthorizationCredentials | None) -> Caller:
    """Return who calls. For work that runs in a thread. Raises as `authenticate_device`, but takes both kinds."""
    if bearer is None:
        raise unauthenticated("expected `Authorization: Bearer <device credential or operator key>`")
    if is_operator_key(cloud, bearer.credentials):
        return Caller(None)
    return Caller(_authenticated_device(session, bearer.credentials, "the operator key or a device's credential"))


async def _body_bytes(request: Request) -> int:
    return len(await request.body())


BodyBytes = Annotated[int, Depends(_body_bytes)]
"""Size of the request's body, for the count of what crossed the network."""

Cursor = Annotated[
    str | None, Query(max_length=200, description="`next_cursor` of the page before; absent for the first page.")
]
Limit = Annotated[int, Query(ge=1, le=200, description="Most items on the page.")]
