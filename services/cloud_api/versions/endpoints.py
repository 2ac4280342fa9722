"""Model versions, for operators."""

from enum import StrEnum
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from sqlalchemy.orm import Session

from cloud_api.artifacts.endpoints import DOWNLOAD_ERRORS, DOWNLOADS, IfNoneMatch, IfRange, RangeHeader
from cloud_api.artifacts.files import Wanted, file_response
from cloud_api.dependencies import CloudHere, Cursor, Limit, OperatorOnly, ReadSession
from cloud_api.documentation import OPERATOR, answers
from cloud_api.runs.endpoints import RunPath
from cloud_api.strict_json import StrictJsonRoute
from cloud_api.versions import examples
from cloud_api.versions.model_card import CardFacts, model_card
from cloud_api.versions.packages import adapter_package, package_response
from persistence import artifacts, runs, traffic, versions
from protocol.errors import DomainError, ErrorCode
from protocol.pages import Page
from protocol.runs import ModelVersion

router = APIRouter(
    prefix="/v1/runs/{run_id}/versions", tags=["versions"], route_class=StrictJsonRoute, dependencies=[OperatorOnly]
)

NumberPath = Annotated[
    int, Path(ge=0, description="The version's number; 0 is the state before the first round.", examples=[3])
]


class AdapterName(StrEnum):
    """Which of a version's adapters."""

    PROXY = "proxy"
    LLM = "llm"


AdapterPath = Annotated[
    AdapterName,
    Path(description="`proxy`: theta, shared by all devices; `llm`: omega.", examples=[AdapterName.PROXY]),
]


@router.get("", summary="List versions", responses=answers(examples.VERSIONS, OPERATOR, ErrorCode.RUN_NOT_FOUND))
def list_versions(
    session: ReadSession, run_id: RunPath, cursor: Cursor = None, limit: Limit = 50
) -> Page[ModelVersion]:
    """The run's versions, the newest first, with their scores and whether they were promoted."""
    return versions.list_versions(session, run_id, cursor=cursor, limit=limit)


@router.get(
    "/{number}",
    summary="Show a version",
    responses=answers(examples.VERSION, OPERATOR, ErrorCode.RUN_NOT_FOUND, ErrorCode.VERSION_NOT_FOUND),
)
def show_version(session: ReadSession, run_id: RunPath, number: NumberPath) -> ModelVersion:
    """One version: its adapters by hash, its scores, and where it comes from: rounds and updates down to version 0."""
    return versions.get_version(session, run_id, number)


@router.get(
    "/{number}/model-card",
    summary="Show a version's model card",
    response_class=Response,
    responses=answers(
        None,
        OPERATOR,
        ErrorCode.RUN_NOT_FOUND,
        ErrorCode.VERSION_NOT_FOUND,
        also={
            200: {
                "description": "Markdown.",
                "content": {"text/markdown": {"schema": {"type": "string"}, "example": examples.MODEL_CARD}},
            }
        },
    ),
)
def show_model_card(session: ReadSession, run_id: RunPath, number: NumberPath) -> Response:
    """What the version is, in Markdown: settings, data in counts, scores before and after, bytes, how to load it."""
    return Response(model_card(_facts(session, run_id, number)), media_type="text/markdown; charset=utf-8")


@router.get(
    "/{number}/adapters/{adapter}",
    summary="Download an adapter of a version",
    response_class=Response,
    responses=answers(
        None,
        OPERATOR,
        DOWNLOAD_ERRORS,
        ErrorCode.RUN_NOT_FOUND,
        ErrorCode.VERSION_NOT_FOUND,
        also={status: each for status, each in DOWNLOADS.items() if status != 307},
    ),
)
async def download_adapter(
    *,
    request: Request,
    cloud: CloudHere,
    run_id: RunPath,
    number: NumberPath,
    adapter: AdapterPath,
    range_header: RangeHeader = None,
    if_range: IfRange = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The adapter's safetensors file, as `/v1/artifacts/{sha256}` serves it."""
    version = await cloud.read(lambda session: versions.get_version(session, run_id, number))
    sha256 = version.proxy_adapter_sha256 if adapter is AdapterName.PROXY else version.llm_adapter_sha256
    if sha256 is None:
        detail = f"version {number} of run {run_id} has no {adapter.value} adapter"
        raise DomainError(ErrorCode.ARTIFACT_NOT_FOUND, detail, received=adapter.value)
    artifact = await cloud.read(lambda session: artifacts.get(session, sha256))
    return await file_response(request, cloud, artifact, Wanted(range_header, if_range, if_none_match))


@router.get(
    "/{number}/adapters/{adapter}/package",
    summary="Download an adapter as peft loads it",
    response_class=Response,
    responses=answers(
        None,
        OPERATOR,
        ErrorCode.ARTIFACT_NOT_FOUND,
        ErrorCode.RUN_NOT_FOUND,
        ErrorCode.VERSION_NOT_FOUND,
        also={
            200: {
                "description": "A tar archive of one folder.",
                "content": {
                    "application/x-tar": {
                        "schema": {"type": "string", "format": "binary"},
                        "example": "(adapter_model.safetensors, adapter_config.json, README.md)",
                    }
                },
            }
        },
    ),
)
async def download_package(
    cloud: CloudHere,
    run_id: RunPath,
    number: NumberPath,
    adapter: AdapterPath,
) -> Response:
    """The adapter with its `adapter_config.json` and model card: unpack it and give peft the folder."""
    facts = await cloud.read(lambda session: _facts(session, run_id, number))
    return await package_response(cloud, adapter_package(facts, adapter.value))


def _facts(session: Session, run_id: str, number: int) -> CardFacts:
    version = versions.get_version(session, run_id, number)
    return CardFacts(
        run=runs.get_run(session, run_id),
        version=version,
        start=versions.get_version(session, run_id, 0),
        contributions=versions.contributions(session, version),
        traffic=traffic.totals(session, run_id),
    )
