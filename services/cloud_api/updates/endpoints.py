"""Updates, for devices."""

from typing import Annotated

from fastapi import APIRouter, Body, Path, Request, Response
from sqlalchemy.orm import Session

from cloud_api.assignments.endpoints import AssignmentPath
from cloud_api.authentication import authenticate_device
from cloud_api.dependencies import BodyBytes, CloudHere, DeviceId, DeviceKey, Now, WriteSession
from cloud_api.documentation import DEVICE, answers
from cloud_api.strict_json import StrictJsonRoute
from cloud_api.updates import examples
from cloud_api.updates.admission import HeaderGate
from cloud_api.updates.admitting import admitted
from cloud_api.updates.receiving import Announced, announced, most_bytes, receive_file
from persistence import assignments, traffic, updates
from persistence.updates import PartAdmission
from protocol.assignments import PartReceipt, Submission, SubmissionReceipt, UpdateOutcome
from protocol.errors import ErrorCode
from protocol.headers import CONTENT_DIGEST_HEADER
from protocol.statuses import PartKind

router = APIRouter(prefix="/v1/assignments/{assignment_id}", tags=["updates"], route_class=StrictJsonRoute)

UPDATE_ERRORS = (
    ErrorCode.ASSIGNMENT_NOT_FOUND,
    ErrorCode.ROUND_CLOSED,
    ErrorCode.UPDATE_CONFLICT,
    ErrorCode.ILLEGAL_TRANSITION,
    ErrorCode.WRONG_BASE_VERSION,
)
FILE_ERRORS = (
    ErrorCode.LENGTH_REQUIRED,
    ErrorCode.BODY_TOO_LARGE,
    ErrorCode.TRUNCATED_BODY,
    ErrorCode.DIGEST_MISMATCH,
    ErrorCode.NOT_SAFETENSORS,
    ErrorCode.WRONG_TENSOR_NAMES,
    ErrorCode.WRONG_TENSOR_SHAPE,
    ErrorCode.WRONG_TENSOR_DTYPE,
    ErrorCode.LOGITS_MISMATCH,
    ErrorCode.MESSAGE_MISMATCH,
)
_PART_REQUEST = {
    "parameters": [
        {
            "name": CONTENT_DIGEST_HEADER,
            "in": "header",
            "required": True,
            "schema": {"type": "string"},
            "description": "RFC 9530, of the file: `sha-256=:<base64>:`. `Content-Length` is required too.",
            "example": "sha-256=:nZ2dnZ2dnZ2dnZ2dnZ2dnZ2dnZ2dnZ2dnZ2dnZ2dnZ0=:",
        }
    ],
    "requestBody": {
        "required": True,
        "description": "A safetensors file.",
        "content": {
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary"},
                "example": "(bytes of a safetensors file)",
            }
        },
    },
}


@router.put(
    "/parts/{kind}",
    status_code=201,
    summary="Upload a part of an update",
    openapi_extra=_PART_REQUEST,
    responses=answers(
        examples.PART_RECEIPT,
        DEVICE,
        UPDATE_ERRORS,
        FILE_ERRORS,
        status=201,
        description="Stored, durably.",
        also={200: {"description": "It was here already; the same receipt.", "model": PartReceipt}},
    ),
)
async def upload_part(
    *,
    request: Request,
    response: Response,
    cloud: CloudHere,
    presented: DeviceKey,
    assignment_id: AssignmentPath,
    kind: Annotated[PartKind, Path(description="Which part.", examples=[PartKind.ADAPTER_DELTA])],
) -> PartReceipt:
    """Send one file of the update. The answer comes when it is durable and its header was admitted.

    Checked before the rest is read: that the round still takes updates, the file's size, its tensors' names, shapes and
    dtypes, and the hashes of what it starts from. The same file again gets the same receipt, another one gets 409.
    """

    def look(session: Session, admission: PartAdmission) -> Announced:
        body = announced(request, most_bytes(cloud, kind, admission))
        updates.find_receipt(session, assignment_id, kind, body.sha256)  # Another file is refused unread.
        return body

    admission, body = await admitted(cloud, presented, assignment_id, kind, look)
    blob = await receive_file(request, cloud, body, HeaderGate(kind, admission, body.size_bytes))
    now = cloud.now()

    def record(session: Session) -> PartReceipt:
        device_id = authenticate_device(session, cloud, presented)  # It may have been revoked while the bytes came.
        receipt = updates.record_part(session, device_id, assignment_id, kind, blob.sha256, blob.size, now)
        traffic.add(session, admission.run_id, device_id, "up", kind.value, blob.size)
        return receipt

    receipt = await cloud.write(record)
    response.status_code = 201 if receipt.received_at == now else 200
    return receipt


@router.post(
    "/submission",
    status_code=201,
    summary="Submit an update",
    responses=answers(
        examples.RECEIPT,
        DEVICE,
        UPDATE_ERRORS,
        ErrorCode.UPDATE_INCOMPLETE,
        status=201,
        description="Received; the device may delete its copy.",
        body=True,
        also={200: {"description": "It was here already; the same receipt.", "model": SubmissionReceipt}},
    ),
)
def submit(
    *,
    response: Response,
    session: WriteSession,
    device_id: DeviceId,
    now: Now,
    body_bytes: BodyBytes,
    assignment_id: AssignmentPath,
    submission: Annotated[Submission, Body(examples=[examples.SUBMISSION.model_dump(mode="json")])],
) -> SubmissionReceipt:
    """Hand in the update whose parts are uploaded. The last one that a round waits for closes the round.

    The same submission again gets the same receipt, also when the round is long over; another one gets 409.
    """
    receipt = updates.submit(session, device_id, assignment_id, submission, now)
    traffic.add(session, assignments.run_of(session, assignment_id), device_id, "up", "metrics", body_bytes)
    response.status_code = 201 if receipt.received_at == now else 200
    return receipt


@router.get(
    "/submission",
    summary="Ask what became of an update",
    responses=answers(examples.OUTCOME, DEVICE, ErrorCode.ASSIGNMENT_NOT_FOUND),
)
def outcome(*, session: WriteSession, device_id: DeviceId, assignment_id: AssignmentPath) -> UpdateOutcome:
    """Counted, quarantined, rejected, late or lost, and why; with its receipt, once it was submitted."""
    return updates.outcome(session, device_id, assignment_id)
