"""Runs, for operators."""

from typing import Annotated

from fastapi import APIRouter, Body, Path, Query

from cloud_api.dependencies import Cursor, Limit, Note, Now, OperatorOnly, ReadSession, WriteSession
from cloud_api.documentation import OPERATOR, answers
from cloud_api.runs import examples
from cloud_api.runs.paths import check_paths
from cloud_api.strict_json import StrictJsonRoute
from persistence import runs, traffic
from protocol.errors import ErrorCode
from protocol.pages import Page
from protocol.runs import Run, RunCreate, RunStop, Traffic
from protocol.statuses import RunStatus

router = APIRouter(prefix="/v1/runs", tags=["runs"], route_class=StrictJsonRoute, dependencies=[OperatorOnly])

RunPath = Annotated[str, Path(max_length=64, description="The run's id.", examples=[examples.RUN_ID])]


@router.post(
    "",
    status_code=201,
    summary="Create a run",
    responses=answers(
        examples.RUN,
        OPERATOR,
        ErrorCode.UNKNOWN_STRATEGY,
        ErrorCode.MODEL_FOLDER_MISSING,
        ErrorCode.DATA_FILE_INVALID,
        ErrorCode.DEVICE_NOT_FOUND,
        ErrorCode.FEDERATION_NOT_FOUND,
        status=201,
        body=True,
    ),
)
def create_run(
    session: WriteSession,
    now: Now,
    note: Note,
    request: Annotated[
        RunCreate,
        Body(
            openapi_examples={
                "co_plms": {
                    "summary": "Co-tune the LLM with the devices' models",
                    "value": examples.RUN_REQUEST.model_dump(mode="json"),
                },
                "fed_lora": {
                    "summary": "Average an adapter of one small model that every device has",
                    "value": examples.FED_LORA_REQUEST.model_dump(mode="json"),
                },
                "fedcollm": {
                    "summary": "The same, with an LLM that learns from it and teaches it",
                    "value": examples.FEDCOLLM_REQUEST.model_dump(mode="json"),
                },
                "standalone": {
                    "summary": "Each device by itself, for comparison",
                    "value": examples.STANDALONE_REQUEST.model_dump(mode="json"),
                },
            }
        ),
    ],
) -> Run:
    """Create a training job. A worker prepares it (for `co_plms`: distils the proxy), then round 1 opens.

    `llm`, `slm`, `proxy.path`, `public_data` and `evaluation_data` are paths on the machine of the API and the worker,
    or Hugging Face hub names.
    """
    check_paths(request)
    run = runs.create_run(session, request, now)
    note.subject = run.run_id
    return run


@router.get("", summary="List runs", responses=answers(examples.RUNS, OPERATOR))
def list_runs(
    *,
    session: ReadSession,
    now: Now,
    cursor: Cursor = None,
    limit: Limit = 50,
    status: Annotated[RunStatus | None, Query(description="Only runs in this status.")] = None,
    federation: Annotated[str | None, Query(max_length=64, description="Only runs of this federation.")] = None,
) -> Page[Run]:
    """Every run, the newest first, page by page."""
    return runs.list_runs(session, cursor=cursor, limit=limit, status=status, federation=federation, now=now)


@router.get("/{run_id}", summary="Show a run", responses=answers(examples.RUN, OPERATOR, ErrorCode.RUN_NOT_FOUND))
def show_run(session: ReadSession, now: Now, run_id: RunPath) -> Run:
    """One run: its status and why it is in it, what it waits for, since when and until when, its newest version."""
    return runs.get_run(session, run_id, now)


@router.post(
    "/{run_id}/stop",
    summary="Stop a run",
    responses=answers(examples.STOPPED, OPERATOR, ErrorCode.RUN_NOT_FOUND, ErrorCode.ILLEGAL_TRANSITION, body=True),
)
def stop_run(
    session: WriteSession,
    now: Now,
    run_id: RunPath,
    request: Annotated[RunStop, Body(examples=[examples.STOP.model_dump(mode="json")])] = RunStop(),  # noqa: B008
) -> Run:
    """End a run for good: its round is abandoned and its jobs are dropped. What was published stays.

    Stopping a stopped run changes nothing.
    """
    return runs.stop_run(session, run_id, request.reason, now)


@router.get(
    "/{run_id}/traffic",
    summary="Show the bytes of a run",
    responses=answers(examples.TRAFFIC, OPERATOR, ErrorCode.RUN_NOT_FOUND),
)
def show_traffic(session: ReadSession, run_id: RunPath) -> Traffic:
    """Bytes of bodies between the server and all devices for this run, by direction and kind."""
    runs.get_run(session, run_id)
    return traffic.totals(session, run_id)
