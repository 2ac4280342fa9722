"""Parts of an update in chunks, for devices: begin or go on, send what is missing, complete.

After the IETF's draft on resumable uploads (draft-ietf-httpbis-resumable-upload), with its `Upload-Length` and
`Upload-Offset`. What differs: chunks have a fixed size and a digest of their own, so that each is checked and kept by
itself and any process of the API can take the next one; and an upload is found again by its file's hash, so that a
device need not remember its address.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response

from cloud_api.assignments.endpoints import AssignmentPath
from cloud_api.dependencies import CloudHere, DeviceKey
from cloud_api.documentation import DEVICE, answers
from cloud_api.idempotency import repeats_by_content
from cloud_api.strict_json import StrictJsonRoute
from cloud_api.updates import examples
from cloud_api.updates.chunked import ChunkedPart
from cloud_api.updates.endpoints import FILE_ERRORS, UPDATE_ERRORS
from protocol.assignments import PartReceipt, PartUpload
from protocol.errors import ErrorCode
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
_UPLOAD_ERRORS = (ErrorCode.UPLOAD_NOT_FOUND, ErrorCode.UPLOAD_OFFSET_MISMATCH)


def _header(name: str, description: str, example: str, *, required: bool = True) -> dict[str, Any]:
    schema = {"type": "string"}
    return {
        "name": name, "in": "header", "required": required, "schema": schema, "description": description,
        "example": example,
    }  # fmt: skip


def _chunk_body(description: str, *, required: bool) -> dict[str, Any]:
    return {
        "required": required,
        "description": description,
        "content": {
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary"},
                "example": "(bytes of a part of a safetensors file)",
            }
        },
    }


_BEGIN_REQUEST = {
    "parameters": [
        _header(UPLOAD_LENGTH_HEADER, "Size of the whole file, bytes.", "10485760"),
        _header(REPR_DIGEST_HEADER, "RFC 9530, of the whole file.", content_digest("9d" * 32)),
        _header(
            CONTENT_DIGEST_HEADER,
            "RFC 9530, of the first chunk, if it comes with this request. `Content-Length` too.",
            content_digest("7c" * 32),
            required=False,
        ),
    ],
    "requestBody": _chunk_body(
        "The file's first chunk, or nothing. It has the server's `chunk_bytes` (4 MiB where nothing else was set) to "
        "8 MiB, or all of a smaller file; each chunk that follows has as many bytes as this one.",
        required=False,
    ),
}
_CHUNK_REQUEST = {
    "parameters": [
        _header(CONTENT_DIGEST_HEADER, "RFC 9530, of the chunk. `Content-Length` too.", content_digest("7c" * 32))
    ],
    "requestBody": _chunk_body("The bytes of the chunk.", required=True),
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
        FILE_ERRORS,
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

    The first chunk may come with it; if it is there already, or more, it is not read. After a cut of any kind, also of
    the device's power: ask this without a chunk, send the chunks from `received_bytes` on, and complete if no receipt
    has come. Another file for the same part takes the place of an unfinished one.
    """
    upload, begun = await ChunkedPart(cloud, presented, assignment_id, kind).begin(request)
    response.status_code = 201 if begun else 200
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

    part = ChunkedPart(cloud, presented, assignment_id, kind)
    upload = await cloud.read(lambda session: part.ask(session, upload_id))
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
    header in it is not the round's. The last one completes the file: the answer has its `receipt`.
    """
    upload = await ChunkedPart(cloud, presented, assignment_id, kind).send(request, upload_id, offset)
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
    """Have a file put together whose chunks are all there and for which no receipt came, and the whole checked.

    Checked are its digest, its tensors' names, shapes and dtypes. A file that is wrong is forgotten with its chunks.
    """
    receipt, new = await ChunkedPart(cloud, presented, assignment_id, kind).complete(upload_id)
    response.status_code = 201 if new else 200
    return receipt
