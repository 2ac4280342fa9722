"""Assignments, for devices."""

from typing import Annotated

from fastapi import APIRouter, Body, Path, Query, Request, Response

from cloud_api.assignments import examples
from cloud_api.assignments.waiting import wait_for_assignment
from cloud_api.dependencies import BodyBytes, CloudHere, DeviceId, DeviceKey, Now, WriteSession
from cloud_api.documentation import DEVICE, answers
from cloud_api.strict_json import StrictJsonRoute
from persistence import assignments, last_steps, traffic
from protocol.assignments import Assignment, AssignmentProgress, AssignmentRefusal, AssignmentState
from protocol.errors import ErrorCode

router = APIRouter(prefix="/v1", tags=["assignments"], route_class=StrictJsonRoute)

AssignmentPath = Annotated[
    str, Path(max_length=64, description="The assignment's id.", examples=[examples.ASSIGNMENT.assignment_id])
]

LONGEST_WAIT_SECONDS = 30


@router.get(
    "/devices/me/assignment",
    summary="Ask for work",
    response_model=Assignment,
    responses=answers(
        examples.ASSIGNMENT,
        DEVICE,
        ErrorCode.DEVICE_NOT_APPROVED,
        description="Something to do.",
        also={204: {"description": "Nothing to do now. Ask again."}},
    ),
)
async def next_assignment(
    request: Request,
    cloud: CloudHere,
    presented: DeviceKey,
    wait_seconds: Annotated[
        int, Query(ge=0, le=LONGEST_WAIT_SECONDS, description="How long the answer may wait for work to come.")
    ] = 0,
) -> Response:
    """The device's share of an open round: its unfinished one, else a new one. Asking twice gives the same.

    With `wait_seconds` the answer comes as soon as there is work (long poll). Counts as a sign of life.
    """
    assignment = await wait_for_assignment(cloud, presented, wait_seconds, request.is_disconnected)
    if assignment is None:
        return Response(status_code=204)
    return Response(assignment, media_type="application/json")


@router.post(
    "/assignments/{assignment_id}/progress",
    summary="Report progress",
    responses=answers(
        examples.STATE,
        DEVICE,
        ErrorCode.ASSIGNMENT_NOT_FOUND,
        ErrorCode.ROUND_CLOSED,
        ErrorCode.ILLEGAL_TRANSITION,
        body=True,
    ),
)
def report_progress(
    *,
    session: WriteSession,
    device_id: DeviceId,
    now: Now,
    body_bytes: BodyBytes,
    assignment_id: AssignmentPath,
    progress: Annotated[AssignmentProgress, Body(examples=[examples.PROGRESS.model_dump(mode="json")])],
) -> AssignmentState:
    """Say where the device is. The status only moves forward; an earlier one updates the stage and losses only."""
    row = assignments.report_progress(session, device_id, assignment_id, progress, now)
    traffic.add(session, row.run_id, device_id, "up", "metrics", body_bytes)
    return AssignmentState(status=row.status)


@router.post(
    "/assignments/{assignment_id}/refusal",
    summary="Refuse an assignment",
    responses=answers(
        examples.REFUSED, DEVICE, ErrorCode.ASSIGNMENT_NOT_FOUND, ErrorCode.ILLEGAL_TRANSITION, body=True
    ),
)
def refuse_assignment(
    *,
    session: WriteSession,
    device_id: DeviceId,
    now: Now,
    body_bytes: BodyBytes,
    assignment_id: AssignmentPath,
    refusal: Annotated[AssignmentRefusal, Body(examples=[examples.REFUSAL.model_dump(mode="json")])],
) -> AssignmentState:
    """Say that this device cannot do it, so that the round need not wait. Repeating it changes nothing."""
    row = assignments.refuse_assignment(session, device_id, assignment_id, refusal, now)
    traffic.add(session, row.run_id, device_id, "up", "metrics", body_bytes)
    return AssignmentState(status=row.status)


@router.get(
    "/assignments/{assignment_id}/last-step",
    summary="Ask for the step after the last round",
    response_model=Assignment,
    responses=answers(
        examples.LAST_STEP,
        DEVICE,
        ErrorCode.ASSIGNMENT_NOT_FOUND,
        ErrorCode.ILLEGAL_TRANSITION,
        description="The run is completed: what to learn from.",
        also={204: {"description": "The run goes on. Ask again."}},
    ),
)
def last_step(*, session: WriteSession, device_id: DeviceId, assignment_id: AssignmentPath) -> Response:
    """What a device learns from once more when its run is completed, where the strategy says so; it sends nothing.

    Asked with the assignment of the last round that the device delivered. 409: there is no such step, nor will be.
    """
    given = last_steps.last_step(session, device_id, assignment_id)
    if given is None:
        return Response(status_code=204)
    content = given.model_dump_json().encode()
    traffic.add(session, given.run_id, device_id, "down", "assignment", len(content))
    return Response(content, media_type="application/json")
