"""Devices: for operators all of them, for a device itself."""

from typing import Annotated

from fastapi import APIRouter, Body, Path, Query

from cloud_api.dependencies import CloudHere, Cursor, DeviceId, Limit, Now, OperatorOnly, ReadSession, WriteSession
from cloud_api.devices import examples
from cloud_api.documentation import DEVICE, OPERATOR, answers
from cloud_api.strict_json import StrictJsonRoute
from persistence import devices, enrolment
from protocol.devices import Device, DeviceCredential, Heartbeat, HeartbeatReceipt
from protocol.errors import ErrorCode
from protocol.pages import Page
from protocol.statuses import DeviceStatus

router = APIRouter(prefix="/v1/devices", tags=["devices"], route_class=StrictJsonRoute)

DevicePath = Annotated[str, Path(max_length=64, description="The device's id.", examples=[examples.DEVICE_ID])]


@router.get(
    "",
    summary="List devices",
    dependencies=[OperatorOnly],
    responses=answers(examples.DEVICES, OPERATOR),
)
def list_devices(
    session: ReadSession,
    cursor: Cursor = None,
    limit: Limit = 50,
    status: Annotated[DeviceStatus | None, Query(description="Only devices in this status.")] = None,
    federation: Annotated[str | None, Query(max_length=64, description="Only devices of this federation.")] = None,
) -> Page[Device]:
    """Every device in the order of enrolment, page by page."""
    return devices.list_devices(session, cursor=cursor, limit=limit, status=status, federation=federation)


@router.get("/me", summary="Show the calling device", responses=answers(examples.DEVICE, DEVICE))
def show_me(session: WriteSession, device_id: DeviceId) -> Device:
    """The calling device as the server knows it: a check that its credential is still good."""
    return devices.get_device(session, device_id)


@router.post(
    "/me/heartbeat",
    summary="Say that the device is alive",
    responses=answers(examples.HEARTBEAT_RECEIPT, DEVICE, body=True),
)
def heartbeat(
    session: WriteSession,
    device_id: DeviceId,
    cloud: CloudHere,
    now: Now,
    heartbeat: Annotated[Heartbeat, Body(examples=[examples.HEARTBEAT.model_dump(mode="json")])],
) -> HeartbeatReceipt:
    """Tell the server what the device does, or why it does nothing. A poll for an assignment counts as well."""
    devices.record_heartbeat(session, device_id, heartbeat, now)
    return HeartbeatReceipt(server_time=now, next_within_seconds=cloud.settings.heartbeat_seconds)


@router.post(
    "/me/credential",
    status_code=201,
    summary="Replace the device's credential",
    responses=answers(examples.CREDENTIAL, DEVICE, status=201),
)
def replace_credential(session: WriteSession, device_id: DeviceId) -> DeviceCredential:
    """Make a new credential for the calling device. Store it, durably, then use it.

    The present one stays good until the new one is first used. If the answer is lost, ask again: the lost one is void.
    """
    return enrolment.offer_credential(session, device_id)


@router.get(
    "/{device_id}",
    summary="Show a device",
    dependencies=[OperatorOnly],
    responses=answers(examples.DEVICE, OPERATOR, ErrorCode.DEVICE_NOT_FOUND),
)
def show_device(session: ReadSession, device_id: DevicePath) -> Device:
    """One device: its profile, whether it is heard from, and what it does."""
    return devices.get_device(session, device_id)


@router.post(
    "/{device_id}/approve",
    summary="Approve a device",
    dependencies=[OperatorOnly],
    responses=answers(examples.DEVICE, OPERATOR, ErrorCode.DEVICE_NOT_FOUND, ErrorCode.ILLEGAL_TRANSITION),
)
def approve_device(session: WriteSession, now: Now, device_id: DevicePath) -> Device:
    """Let a device that enrolled with a token that asks for approval take part. It gets work at its next poll."""
    return devices.approve_device(session, device_id, now)


@router.post(
    "/{device_id}/revoke",
    summary="Revoke a device",
    dependencies=[OperatorOnly],
    responses=answers(examples.DEVICE, OPERATOR, ErrorCode.DEVICE_NOT_FOUND),
)
def revoke_device(session: WriteSession, now: Now, device_id: DevicePath) -> Device:
    """Void the device's credential for ever, at once; what it sent is not counted unless it is being aggregated."""
    return devices.revoke_device(session, device_id, now)
