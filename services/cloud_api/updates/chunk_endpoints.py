"""Parts of an update in chunks, for devices: begin or go on, send what is missing, complete.

After the IETF's draft on resumable uploads (draft-ietf-httpbis-resumable-upload), with its `Upload-Length` and
`Upload-Offset`. What differs: chunks have a fixed size and a digest of their own, so that each is checked and kept by
itself and any process of the API can take the next one; and an upload is found again by its file's hash, so that a
device need not remember its address.
"""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from cloud_api.assignments.endpoints import AssignmentPath
from cloud_api.authentication import Presented, authenticate_device
from cloud_api.cloud import Cloud
from cloud_api.dependencies import CloudHere, DeviceKey
from cloud_api.documentation import DEVICE, answers
from cloud_api.idempotency import repeats_by_content
from cloud_api.strict_json import StrictJsonRoute
from cloud_api.updates import examples
from cloud_api.updates.admission import HeaderGate
from cloud_api.updates.endpoints import FILE_ERRORS, UPDATE_ERRORS
from cloud_api.updates.receiving import Announced, announced, assemble, most_bytes, receive_file
from persistence import assignments, part_uploads, traffic, updates
from persistence.part_uploads import ReceivedFile, UploadPlace
from persistence.updates import PartAdmission
from protocol.assignments import PartReceipt, PartUpload
from protocol.errors import DomainError, ErrorCode
from protocol.headers import (
    CONTENT_DIGEST_HEADER,
    REPR_DIGEST_HEADER,
    UPLOAD_LENGTH_HEADER,
    UPLOAD_OFFSET_HEADER,
    content_digest,
)
from protocol.statuses import PartKind

router = APIRouter(
    prefix="/v1/assignments/{assignment_id}/parts/{kind}/uploads", tags=["updates"], route_class=StrictJsonRoute
)

Kind = Annotated[PartKind, Path(description="Which part.", examples=[PartKind.ADAPTER_DELTA])]
UploadPath = Annotated[
    str, Path(max_length=64, description="The upload's id.", examples=[examples.PART_UPLOAD.upload_id])
]
Offset = Annotated[
    int,
    Header(
        alias=UPLOAD_OFFSET_HEADER,
        ge=0,
        le=2**53,
        description="Where the chunk starts in the file, bytes.",
        examples=[4194304],
    ),
]
_WRONG_UPLOAD = frozenset(
    {
        ErrorCode.DIGEST_MISMATCH,
        ErrorCode.NOT_SAFETENSORS,
        ErrorCode.WRONG_BASE_VERSION,
        ErrorCode.WRONG_TENSOR_NAMES,
        ErrorCode.WRONG_TENSOR_SHAPE,
        ErrorCode.WRONG_TENSOR_DTYPE,
        ErrorCode.LOGITS_MISMATCH,
    }
)
"""What no further chunk can mend."""

_UPLOAD_ERRORS = (ErrorCode.UPLOAD_NOT_FOUND, ErrorCode.UPLOAD_OFFSET_MISMATCH)


def _header(name: str, description: str, example: str) -> dict[str, Any]:
    schema = {"type": "string"}
    return {
        "name": name, "in": "header", "required": True, "schema": schema, "description": description,
        "example": example,
    }  # fmt: skip


_BEGIN_REQUEST = {
    "parameters": [
        _header(UPLOAD_LENGTH_HEADER, "Size of the whole file, bytes.", "10485760"),
        _header(REPR_DIGEST_HEADER, "RFC 9530, of the whole file.", content_digest("9d" * 32)),
    ]
}
_CHUNK_REQUEST = {
    "parameters": [
        _header(CONTENT_DIGEST_HEADER, "RFC 9530, of the chunk. `Content-Length` too.", content_digest("7c" * 32))
    ],
    "requestBody": {
        "required": True,
        "description": "The bytes of the chunk.",
        "content": {
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary"},
                "example": "(bytes of a part of a safetensors file)",
            }
        },
    },
}


@router.post(
    "",
    status_code=201,
    summary="Begin to upload a part in chunks, or go on",
    openapi_extra=_BEGIN_REQUEST,
    responses=answers(
        examples.PART_UPLOAD,
        DEVICE,
        UPDATE_ERRORS,
        ErrorCode.LENGTH_REQUIRED,
        ErrorCode.BODY_TOO_LARGE,
        status=201,
        description="Begun.",
        also={200: {"description": "It was begun before, or is complete.", "model": PartUpload}},
    ),
)
@repeats_by_content
async def begin_upload(
    *,
    request: Request,
    response: Response,
    cloud: CloudHere,
    presented: DeviceKey,
    assignment_id: AssignmentPath,
    kind: Kind,
) -> PartUpload:
    """Say which file will come; the answer says how many of its bytes are there. The same again finds the same upload.

    After a cut of any kind, also of the device's power: ask this, send the chunks from `received_bytes` on, complete.
    Another file for the same part takes the place of an unfinished one.
    """
    now = cloud.now()

    def begin(session: Session) -> tuple[PartUpload, str | None]:
        admission = _admit(session, cloud, presented, assignment_id, kind)[1]
        file = announced(
            request, most_bytes(cloud, kind, admission), length_header=UPLOAD_LENGTH_HEADER,
            digest_header=REPR_DIGEST_HEADER,
        )  # fmt: skip
        chunk_bytes = cloud.settings.upload_chunk_bytes
        return part_uploads.begin(session, assignment_id, kind, file.sha256, file.size_bytes, chunk_bytes, now)

    upload, forgotten = await cloud.write(begin)
    if forgotten is not None:
        await run_in_threadpool(cloud.blobs.drop_stage, forgotten)
    response.status_code = 200 if upload.receipt or upload.received_bytes else 201
    response.headers[UPLOAD_OFFSET_HEADER] = str(upload.received_bytes)
    return upload


@router.get(
    "/{upload_id}",
    summary="Ask how far an upload has come",
    responses=answers(examples.PART_UPLOAD, DEVICE, ErrorCode.ASSIGNMENT_NOT_FOUND, ErrorCode.UPLOAD_NOT_FOUND),
)
async def ask_upload(
    *,
    response: Response,
    cloud: CloudHere,
    presented: DeviceKey,
    assignment_id: AssignmentPath,
    kind: Kind,
    upload_id: UploadPath,
) -> PartUpload:
    """How many bytes are there."""

    def ask(session: Session) -> PartUpload:
        assignments.owned(session, authenticate_device(session, cloud, presented), assignment_id)
        return part_uploads.get(session, assignment_id, kind, upload_id)

    upload = await cloud.read(ask)
    response.headers[UPLOAD_OFFSET_HEADER] = str(upload.received_bytes)
    return upload


@router.patch(
    "/{upload_id}",
    summary="Send a chunk",
    openapi_extra=_CHUNK_REQUEST,
    responses=answers(
        examples.PART_UPLOAD, DEVICE, UPDATE_ERRORS, FILE_ERRORS, _UPLOAD_ERRORS, description="Stored, durably."
    ),
)
async def send_chunk(
    *,
    request: Request,
    response: Response,
    cloud: CloudHere,
    presented: DeviceKey,
    assignment_id: AssignmentPath,
    kind: Kind,
    upload_id: UploadPath,
    offset: Offset,
) -> PartUpload:
    """Send the bytes from `Upload-Offset` on: `chunk_bytes` of them, or what is left of the file.

    The same chunk again changes nothing; another one for the same place gets 409. The first one is refused if the
    header in it is not the round's.
    """

    def admit(session: Session) -> tuple[PartAdmission, UploadPlace, Announced]:
        admission = _admit(session, cloud, presented, assignment_id, kind)[1]
        place = part_uploads.place(session, assignment_id, kind, upload_id, offset)
        chunk = announced(request, place.chunk_size)
        part_uploads.refuse_other_chunk(session, assignment_id, kind, upload_id, offset, chunk.sha256)
        return admission, place, chunk

    admission, place, chunk = await cloud.write(admit)
    if chunk.size_bytes != place.chunk_size:
        detail = f"expected a chunk of {place.chunk_size} bytes at {offset}, `Content-Length` says {chunk.size_bytes}"
        raise DomainError(ErrorCode.INVALID_FIELD, detail, expected=place.chunk_size, received=chunk.size_bytes)
    gate = HeaderGate(kind, admission, place.size_bytes) if offset == 0 else None
    stored = await receive_file(request, cloud, chunk, gate, stage=upload_id)
    now = cloud.now()

    def record(session: Session) -> PartUpload:
        device_id = authenticate_device(session, cloud, presented)  # It may have been revoked while the bytes came.
        traffic.add(session, admission.run_id, device_id, "up", kind.value, stored.size)
        return part_uploads.record_chunk(session, assignment_id, kind, upload_id, offset, stored.sha256, now)

    upload = await cloud.write(record)
    response.headers[UPLOAD_OFFSET_HEADER] = str(upload.received_bytes)
    return upload


@router.post(
    "/{upload_id}/completion",
    status_code=201,
    summary="Complete an upload",
    responses=answers(
        examples.PART_RECEIPT,
        DEVICE,
        UPDATE_ERRORS,
        FILE_ERRORS,
        _UPLOAD_ERRORS,
        status=201,
        description="All of it is stored, durably.",
        also={200: {"description": "It was complete already; the same receipt.", "model": PartReceipt}},
    ),
)
@repeats_by_content
async def complete_upload(
    *,
    response: Response,
    cloud: CloudHere,
    presented: DeviceKey,
    assignment_id: AssignmentPath,
    kind: Kind,
    upload_id: UploadPath,
) -> PartReceipt:
    """Have the chunks put together and the whole checked: its digest, its tensors' names, shapes and dtypes.

    A file that is wrong is forgotten with its chunks.
    """

    # Side by side, each would write the whole file, and ask for nothing but one small request.
    async with cloud.completing.of(upload_id):
        receipt, now = await _complete(cloud, presented, assignment_id, kind, upload_id)
    response.status_code = 201 if receipt.received_at == now else 200
    return receipt


async def _complete(
    cloud: Cloud, presented: Presented, assignment_id: str, kind: PartKind, upload_id: str
) -> tuple[PartReceipt, datetime | None]:
    """Return the receipt, and when it was made if it was made now."""

    def find(session: Session) -> tuple[PartAdmission, ReceivedFile | PartReceipt]:
        admission = _admit(session, cloud, presented, assignment_id, kind)[1]
        sha256 = part_uploads.announced_file(session, assignment_id, kind, upload_id)
        known = updates.find_receipt(session, assignment_id, kind, sha256)
        return admission, known or part_uploads.received_file(session, assignment_id, kind, upload_id)

    admission, file = await cloud.write(find)
    if isinstance(file, PartReceipt):
        return file, None
    gate = HeaderGate(kind, admission, file.size_bytes)
    try:
        blob = await run_in_threadpool(assemble, cloud, upload_id, file, gate)
    except DomainError as error:
        if error.code in _WRONG_UPLOAD:
            await _forget(cloud, upload_id)
        elif error.code is ErrorCode.ARTIFACT_NOT_FOUND:
            await _forget(cloud, upload_id)
            raise DomainError(ErrorCode.UPLOAD_NOT_FOUND, "chunks of it are gone; begin again") from error
        raise
    now = cloud.now()

    def record(session: Session) -> PartReceipt:
        device_id = authenticate_device(session, cloud, presented)
        receipt = updates.record_part(session, device_id, assignment_id, kind, blob.sha256, blob.size, now)
        part_uploads.forget(session, upload_id)
        return receipt

    receipt = await cloud.write(record)
    await run_in_threadpool(cloud.blobs.drop_stage, upload_id)
    return receipt, now


def _admit(
    session: Session, cloud: Cloud, presented: Presented, assignment_id: str, kind: PartKind
) -> tuple[str, PartAdmission]:
    device_id = authenticate_device(session, cloud, presented)
    return device_id, updates.admit_part(session, device_id, assignment_id, kind, cloud.now())


async def _forget(cloud: Cloud, upload_id: str) -> None:
    await cloud.write(lambda session: part_uploads.forget(session, upload_id))
    await run_in_threadpool(cloud.blobs.drop_stage, upload_id)
