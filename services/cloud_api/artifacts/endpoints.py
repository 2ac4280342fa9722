"""Artifacts, for devices (what their runs gave them) and operators (all)."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response
from sqlalchemy.orm import Session

from cloud_api.artifacts.files import Wanted, file_response
from cloud_api.authentication import Caller, Presented, authenticate_caller
from cloud_api.dependencies import CloudHere, EitherKey
from cloud_api.documentation import CALLER, answers
from cloud_api.strict_json import StrictJsonRoute
from persistence import artifacts
from persistence.artifacts import Artifact
from protocol.errors import ErrorCode
from protocol.headers import CONTENT_DIGEST_HEADER, LINKS_FOLLOW, LINKS_HEADER, REPR_DIGEST_HEADER, content_digest

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], route_class=StrictJsonRoute)

_EXAMPLE = "3b" * 32
Sha256Path = Annotated[
    str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file, hexadecimal.", examples=[_EXAMPLE])
]
RangeHeader = Annotated[
    str | None,
    Header(alias="Range", description="One range: what a cut download lacks.", examples=["bytes=1048576-"]),
]
IfRange = Annotated[
    str | None,
    Header(
        alias="If-Range", description="The `ETag` of the bytes that are there; if it is another file, all of it comes."
    ),
]
IfNoneMatch = Annotated[
    str | None,
    Header(alias="If-None-Match", description="`ETag`s that the client has; 304 if this is one of them."),
]

Links = Annotated[
    str | None,
    Header(
        alias=LINKS_HEADER,
        description=f"`{LINKS_FOLLOW}`: the client can fetch the file from another host. Without `Authorization`!",
    ),
]

DOWNLOAD_ERRORS = (ErrorCode.ARTIFACT_NOT_FOUND, ErrorCode.RANGE_NOT_SATISFIABLE)

_TEXT = {"schema": {"type": "string"}}
_FILE_HEADERS: dict[str, Any] = {
    "ETag": _TEXT | {"description": "The SHA-256 in quotes.", "example": f'"{_EXAMPLE}"'},
    "Accept-Ranges": _TEXT | {"description": "`bytes`."},
    REPR_DIGEST_HEADER: _TEXT | {"description": "RFC 9530, of the whole file.", "example": content_digest(_EXAMPLE)},
}
_BYTES = {
    "application/octet-stream": {
        "schema": {"type": "string", "format": "binary"},
        "example": "(bytes of a safetensors, JSON or JSONL file)",
    }
}
_NOT_CHANGED = {"description": "The client has it already.", "headers": _FILE_HEADERS}
DOWNLOADS: dict[int, dict[str, Any]] = {
    200: {
        "description": "The whole file.",
        "content": _BYTES,
        "headers": _FILE_HEADERS
        | {CONTENT_DIGEST_HEADER: _TEXT | {"description": "RFC 9530, of this answer's content."}},
    },
    206: {
        "description": "The range that was asked for.",
        "content": _BYTES,
        "headers": _FILE_HEADERS | {"Content-Range": _TEXT | {"example": "bytes 1048576-4194303/4194304"}},
    },
    304: _NOT_CHANGED,
    307: {
        "description": "Where the file is for a short time; only with `Cotune-Links: follow`, and where the operator "
        "allows it. Whoever has the link can read the file: send it no credential, tell it nobody, check the digest.",
        "headers": _FILE_HEADERS | {"Location": _TEXT | {"description": "A link to the object store."}},
    },
}
_HEADERS_ONLY: dict[int, dict[str, Any]] = {
    200: {"description": "It is there; the headers say how long it is.", "headers": _FILE_HEADERS},
    304: _NOT_CHANGED,
}


@router.get(
    "/{sha256}",
    summary="Download a file",
    response_class=Response,
    responses=answers(None, CALLER, DOWNLOAD_ERRORS, also=DOWNLOADS),
)
async def download(
    *,
    request: Request,
    cloud: CloudHere,
    presented: EitherKey,
    sha256: Sha256Path,
    range_header: RangeHeader = None,
    if_range: IfRange = None,
    if_none_match: IfNoneMatch = None,
    links: Links = None,
) -> Response:
    """A file by its hash, resumable. Devices get what a run gave them: proxy base, adapter, probe set.

    To go on after a cut: `Range: bytes=<what is there>-` with `If-Range: "<sha256>"`.
    """
    caller, artifact = await _find(cloud, presented, sha256)
    wanted = Wanted(range_header, if_range, if_none_match, link=links == LINKS_FOLLOW)
    return await file_response(request, cloud, artifact, wanted, device_id=caller.device_id)


@router.head(
    "/{sha256}",
    summary="Ask about a file",
    response_class=Response,
    responses=answers(None, CALLER, ErrorCode.ARTIFACT_NOT_FOUND, also=_HEADERS_ONLY),
)
async def ask(
    *,
    request: Request,
    cloud: CloudHere,
    presented: EitherKey,
    sha256: Sha256Path,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The headers of a download without the file: is it there, how long is it, has it changed.

    A `Range` is ignored, as RFC 9110 has it for every method but GET.
    """
    _, artifact = await _find(cloud, presented, sha256)
    return await file_response(request, cloud, artifact, Wanted(if_none_match=if_none_match))


async def _find(cloud: CloudHere, presented: Presented, sha256: str) -> tuple[Caller, Artifact]:
    def find(session: Session) -> tuple[Caller, Artifact]:
        caller = authenticate_caller(session, cloud, presented)
        if caller.device_id is None:
            return caller, artifacts.get(session, sha256)
        return caller, artifacts.get_for_device(session, sha256, caller.device_id)

    return await cloud.read(find)
