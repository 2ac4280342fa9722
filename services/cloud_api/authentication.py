"""Who calls: an operator by key and role, or a device by credential and, if it has a key, by signature.

Everything here may wait (for the database, for Redis): it is for work that runs in a thread.
"""

import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from cloud_api.cloud import Cloud
from cloud_api.problems import request_facts
from cloud_api.signatures import RequestParts, verify
from persistence import enrolment, operators
from protocol.errors import HTTP_STATUS, DomainError, ErrorCode
from protocol.operators import OperatorRole

BOOTSTRAP = "bootstrap"
"""Id and name of the operator key of the settings."""


@dataclass(frozen=True)
class Operator:
    """An operator who calls."""

    key_id: str
    name: str
    role: OperatorRole


@dataclass
class Presented:
    """What a request shows to prove who sends it. It lives as long as the request."""

    bearer: str | None
    address: str
    request: RequestParts
    proved: set[str] = field(default_factory=set)
    """Devices whose signature under this request was verified: a long poll asks again, and a nonce is good once."""


@dataclass(frozen=True)
class Caller:
    """Who calls an operation that operators and devices may both use."""

    device_id: str | None
    """None: an operator."""


def unauthenticated(detail: str) -> DomainError:
    """Return the error for a request without a valid credential."""
    return DomainError(ErrorCode.UNAUTHENTICATED, detail)


def is_bootstrap_key(cloud: Cloud, key: str) -> bool:
    """Return whether `key` is that of the settings. The time taken tells nothing about how much of it is right."""
    return hmac.compare_digest(key.encode("utf-8", "replace"), cloud.settings.operator_key.encode())


def authenticate_operator(session: Session, cloud: Cloud, presented: Presented) -> Operator:
    """Return the operator who calls.

    Raises:
        DomainError: UNAUTHENTICATED; FORBIDDEN or DEVICE_REVOKED for a device's credential; RATE_LIMITED.
    """
    expected = "an operator key"
    with _judging(cloud, presented, f"expected `Authorization: Bearer <{expected}>`") as bearer:
        operator = _operator(session, cloud, bearer)
        if operator is not None:
            return operator
        # A device's credential is a valid one of the wrong kind: 403. Anything else is 401.
        _by_credential(session, bearer, expected)
        raise DomainError(ErrorCode.FORBIDDEN, f"expected {expected}, got a device's credential")


def authenticate_device(session: Session, cloud: Cloud, presented: Presented) -> str:
    """Return the id of the calling device. In a transaction that is committed, it also drops the credential before.

    Raises as `identify_device`.
    """
    return identify_device(session, cloud, presented).device_id


def identify_device(session: Session, cloud: Cloud, presented: Presented) -> enrolment.DeviceIdentity:
    """Return who the calling device is, and drop the credential before as `authenticate_device` does.

    Raises:
        DomainError: UNAUTHENTICATED, DEVICE_REVOKED, SIGNATURE_*, REQUEST_REPLAYED, RATE_LIMITED, or FORBIDDEN for an
            operator's key.
    """
    identity = _device(session, cloud, presented)
    enrolment.adopt_credential(session, identity)
    return identity


def recognise_device(session: Session, cloud: Cloud, presented: Presented) -> str:
    """Return the id of the calling device, in a session that only reads. Raises as `identify_device`."""
    return _device(session, cloud, presented).device_id


def _device(session: Session, cloud: Cloud, presented: Presented) -> enrolment.DeviceIdentity:
    with _judging(cloud, presented, "expected `Authorization: Bearer <device credential>`") as bearer:
        if _operator(session, cloud, bearer) is not None:
            raise DomainError(ErrorCode.FORBIDDEN, "expected a device's credential, got an operator key")
        identity = _by_credential(session, bearer, "the credential of an enrolled device")
        _prove(cloud, presented, identity)
        return identity


def prove_again(cloud: Cloud, presented: Presented, identity: enrolment.DeviceIdentity) -> str:
    """Return the id of a device that the database has known lately by this credential. Raises as `identify_device`."""
    with _judging(cloud, presented, "expected `Authorization: Bearer <device credential>`"):
        _prove(cloud, presented, identity)
        request_facts.get({})["device_id"] = identity.device_id
        return identity.device_id


def authenticate_caller(session: Session, cloud: Cloud, presented: Presented) -> Caller:
    """Return who calls. Raises as `authenticate_device`, but takes both kinds."""
    expected = "expected `Authorization: Bearer <device credential or operator key>`"
    with _judging(cloud, presented, expected) as bearer:
        if _operator(session, cloud, bearer) is not None:
            return Caller(None)
        identity = _by_credential(session, bearer, "an operator key or a device's credential")
        _prove(cloud, presented, identity)
        return Caller(identity.device_id)


@contextmanager
def _judging(cloud: Cloud, presented: Presented, expected: str) -> Iterator[str]:
    """Give the credential, if one came and not too many wrong ones did before; count it if it is wrong."""
    bearer = presented.bearer
    if bearer is None:
        raise unauthenticated(expected)
    cloud.limits.before_authentication(presented.address, bearer)
    try:
        yield bearer
    except DomainError as error:
        if HTTP_STATUS[error.code] == 401:
            cloud.limits.failed_authentication(presented.address, bearer)
        raise


def _operator(session: Session, cloud: Cloud, bearer: str) -> Operator | None:
    if is_bootstrap_key(cloud, bearer):
        operator = Operator(BOOTSTRAP, BOOTSTRAP, OperatorRole.ADMIN)
    elif bearer.startswith(operators.KEY_PREFIX):
        key = operators.authenticate(session, bearer, cloud.now())
        operator = Operator(key.key_id, key.name, key.role)
    else:
        return None
    request_facts.get({})["operator"] = operator.key_id
    return operator


def _by_credential(session: Session, credential: str, expected: str) -> enrolment.DeviceIdentity:
    try:
        identity = enrolment.authenticate(session, credential)
    except DomainError as error:
        if error.code is ErrorCode.UNAUTHENTICATED:
            raise unauthenticated(f"expected {expected}, got something that this server does not know") from None
        raise
    request_facts.get({})["device_id"] = identity.device_id
    return identity


def _prove(cloud: Cloud, presented: Presented, identity: enrolment.DeviceIdentity) -> None:
    device_id, settings = identity.device_id, cloud.settings
    if device_id in presented.proved:
        return
    cloud.limits.device(device_id)
    if identity.public_key is not None:
        verify(
            presented.request,
            device_id,
            identity.public_key,
            memory=cloud.memory,
            now=cloud.now(),
            window_seconds=settings.signature_window_seconds,
        )
    elif settings.require_signatures:
        detail = (
            "this server takes signed requests only, and this device was enrolled without a public key: enrol again"
        )
        raise DomainError(ErrorCode.SIGNATURE_REQUIRED, detail)
    presented.proved.add(device_id)
