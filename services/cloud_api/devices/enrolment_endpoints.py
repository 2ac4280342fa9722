"""Enrolment: a token from an operator, an identity for a device."""

from typing import Annotated

from fastapi import APIRouter, Body, Path

from cloud_api.dependencies import (
    CloudHere,
    Cursor,
    Limit,
    LimitedEnrolment,
    Note,
    Now,
    OperatorOnly,
    ReadSession,
    WriteSession,
)
from cloud_api.devices import examples
from cloud_api.documentation import OPERATOR, answers
from cloud_api.strict_json import StrictJsonRoute
from persistence import enrolment
from protocol.devices import (
    EnrolmentReceipt,
    EnrolmentRequest,
    EnrolmentToken,
    EnrolmentTokenCreate,
    EnrolmentTokenState,
)
from protocol.errors import DomainError, ErrorCode
from protocol.pages import Page

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
    note: Note,
    request: Annotated[EnrolmentTokenCreate, Body(examples=[examples.TOKEN_REQUEST.model_dump(mode="json")])],
) -> EnrolmentToken:
    """Make a secret that lets so many devices enrol until it expires. It is shown this once."""
    created = enrolment.create_token(session, request, now)
    note.subject = created.token_id
    note.data = {"uses": request.uses, "approval": request.approval}
    return created


@router.get(
    "/enrolment-tokens",
    summary="List enrolment tokens",
    dependencies=[OperatorOnly],
    responses=answers(examples.TOKENS, OPERATOR),
)
def list_tokens(session: ReadSession, cursor: Cursor = None, limit: Limit = 50) -> Page[EnrolmentTokenState]:
    """Every token, the newest first, also those that are spent or void; without their secrets."""
    return enrolment.list_tokens(session, cursor=cursor, limit=limit)


@router.delete(
    "/enrolment-tokens/{token_id}",
    summary="Revoke an enrolment token",
    dependencies=[OperatorOnly],
    responses=answers(examples.TOKENS.items[0], OPERATOR, ErrorCode.ENROLMENT_TOKEN_NOT_FOUND),
)
def revoke_token(
    session: WriteSession,
    now: Now,
    token_id: Annotated[str, Path(max_length=64, description="The token's id.", examples=["tok_0197c0ffee00"])],
) -> EnrolmentTokenState:
    """Let nobody enrol with it any more, at once. Devices that have enrolled with it stay."""
    return enrolment.revoke_token(session, token_id, now)


@router.post(
    "/devices",
    status_code=201,
    summary="Enrol a device",
    dependencies=[LimitedEnrolment],
    responses=answers(
        examples.RECEIPT,
        ErrorCode.ENROLMENT_TOKEN_UNKNOWN,
        ErrorCode.ENROLMENT_TOKEN_USED,
        ErrorCode.ENROLMENT_TOKEN_EXPIRED,
        ErrorCode.ENROLMENT_TOKEN_REVOKED,
        ErrorCode.SIGNATURE_REQUIRED,
        status=201,
        body=True,
    ),
)
def enrol(
    session: WriteSession,
    now: Now,
    cloud: CloudHere,
    request: Annotated[EnrolmentRequest, Body(examples=[examples.ENROLMENT.model_dump(mode="json")])],
) -> EnrolmentReceipt:
    """Trade an enrolment token for a device's identity. The token is the proof; no other credential is needed.

    The credential in the answer is shown this once. Keep it on the device, readable by its owner only. With a
    `public_key` every later request must be signed with its private key. The status is `pending` where an operator has
    to approve the device first.
    """
    if request.public_key is None and cloud.settings.require_signatures:
        detail = "this server takes signed requests only: expected the device's `public_key`"
        raise DomainError(ErrorCode.SIGNATURE_REQUIRED, detail)
    return enrolment.enrol(session, request, now)
