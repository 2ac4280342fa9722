"""Federations, for operators."""

from typing import Annotated

from fastapi import APIRouter, Body, Path

from cloud_api.dependencies import Cursor, Limit, Note, Now, OperatorOnly, ReadSession, WriteSession
from cloud_api.devices.endpoints import DevicePath
from cloud_api.documentation import OPERATOR, answers
from cloud_api.federations import examples
from cloud_api.strict_json import StrictJsonRoute
from persistence import federations
from protocol.errors import ErrorCode
from protocol.federations import Federation, FederationChange, FederationCreate
from protocol.pages import Page

router = APIRouter(
    prefix="/v1/federations", tags=["federations"], route_class=StrictJsonRoute, dependencies=[OperatorOnly]
)

FederationPath = Annotated[
    str, Path(max_length=64, description="The federation's name.", examples=[examples.FEDERATION.name])
]


@router.post(
    "",
    status_code=201,
    summary="Create a federation",
    responses=answers(examples.FEDERATION, OPERATOR, ErrorCode.NAME_TAKEN, status=201, body=True),
)
def create_federation(
    session: WriteSession,
    now: Now,
    note: Note,
    request: Annotated[FederationCreate, Body(examples=[examples.CREATE.model_dump(mode="json")])],
) -> Federation:
    """Make a federation without devices. They come by enrolment tokens that name it, or one by one."""
    note.subject = request.name
    return federations.create_federation(session, request, now)


@router.get("", summary="List federations", responses=answers(examples.FEDERATIONS, OPERATOR))
def list_federations(session: ReadSession, cursor: Cursor = None, limit: Limit = 50) -> Page[Federation]:
    """Every federation in the order of the names, page by page. `default` is always there."""
    return federations.list_federations(session, cursor=cursor, limit=limit)


@router.get(
    "/{federation}",
    summary="Show a federation",
    responses=answers(examples.FEDERATION, OPERATOR, ErrorCode.FEDERATION_NOT_FOUND),
)
def show_federation(session: ReadSession, federation: FederationPath) -> Federation:
    """One federation with the numbers of its devices and runs; the lists of both take it as a filter."""
    return federations.get_federation(session, federation)


@router.patch(
    "/{federation}",
    summary="Change a federation",
    responses=answers(examples.FEDERATION, OPERATOR, ErrorCode.FEDERATION_NOT_FOUND, body=True),
)
def change_federation(
    session: WriteSession,
    federation: FederationPath,
    request: Annotated[FederationChange, Body(examples=[examples.CHANGE.model_dump(mode="json")])],
) -> Federation:
    """Change its description. The name is its address and stays."""
    return federations.change_federation(session, federation, request)


@router.delete(
    "/{federation}",
    status_code=204,
    summary="Delete a federation",
    responses=answers(
        None,
        OPERATOR,
        ErrorCode.FEDERATION_NOT_FOUND,
        ErrorCode.CONFLICT,
        also={204: {"description": "It is gone. Its devices stay in their other federations."}},
    ),
)
def delete_federation(session: WriteSession, now: Now, federation: FederationPath) -> None:
    """Delete a federation that has no runs and that no usable enrolment token names; never `default`."""
    federations.delete_federation(session, federation, now)


@router.put(
    "/{federation}/devices/{device_id}",
    summary="Add a device to a federation",
    responses=answers(examples.FEDERATION, OPERATOR, ErrorCode.FEDERATION_NOT_FOUND, ErrorCode.DEVICE_NOT_FOUND),
)
def add_device(session: WriteSession, now: Now, federation: FederationPath, device_id: DevicePath) -> Federation:
    """Let a device take part in this federation's runs too. Repeating it changes nothing."""
    federations.add_device(session, federation, device_id, now)
    return federations.get_federation(session, federation)


@router.delete(
    "/{federation}/devices/{device_id}",
    summary="Remove a device from a federation",
    responses=answers(examples.FEDERATION, OPERATOR, ErrorCode.FEDERATION_NOT_FOUND, ErrorCode.DEVICE_NOT_FOUND),
)
def remove_device(session: WriteSession, now: Now, federation: FederationPath, device_id: DevicePath) -> Federation:
    """Give the device no more work of this federation; what it is doing it may finish. Repeating changes nothing."""
    federations.remove_device(session, federation, device_id, now)
    return federations.get_federation(session, federation)
