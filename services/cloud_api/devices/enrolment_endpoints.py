"""Enrolment: a token from an operator, an identity for a device."""

from typing import Annotated

from fastapi import APIRouter, Body

from cloud_api.dependencies import Now, OperatorOnly, WriteSession
from cloud_api.devices import examples
from cloud_api.documentation import OPERATOR, answers
from cloud_api.strict_json import StrictJsonRoute
from persistence import enrolment
from protocol.devices import EnrolmentReceipt, EnrolmentRequest, EnrolmentToken, EnrolmentTokenCreate
from protocol.errors import ErrorCode

router = APIRouter(prefix="/v1", tags=["enrolment"], route_class=StrictJsonRoute)


@router.post(
    "/enrolment-tokens",
    status_code=201,
    summary="Create an enrolment token",
    dependencies=[OperatorOnly],
    responses=answers(examples.TOKEN, OPERATOR, ErrorCode.FEDERATION_NOT_FOUND, status=201, body=True),
)
def create_token(
    session: WriteSession,
    now: Now,
    request: Annotated[EnrolmentTokenCreate, Body(examples=[examples.TOKEN_REQUEST.model_dump(mode="json")])],
) -> EnrolmentToken:
    """Make a secret that lets so many devices enrol until it expires. It is shown this once."""
    return enrolment.create_token(session, request, now)


@router.post(
    "/devices",
    status_code=201,
    summary="Enrol a device",
    responses=answers(
        examples.RECEIPT,
        ErrorCode.ENROLMENT_TOKEN_UNKNOWN,
        ErrorCode.ENROLMENT_TOKEN_USED,
        ErrorCode.ENROLMENT_TOKEN_EXPIRED,
        status=201,
        body=True,
    ),
)
def enrol(
    session: WriteSession,
    now: Now,
    request: Annotated[EnrolmentRequest, Body(examples=[examples.ENROLMENT.model_dump(mode="json")])],
) -> EnrolmentReceipt:
    """Trade an enrolment token for a device's identity. The token is the proof; no other credential is needed.

    The credential in the answer is shown this once. Keep it on the device, readable by its owner only.
    """
    return enrolment.enrol(session, request, now)
