"""What operators do with a run that exists, besides stopping it."""

from typing import Annotated

from fastapi import APIRouter, Body

from cloud_api.dependencies import Now, OperatorOnly, WriteSession
from cloud_api.documentation import OPERATOR, answers
from cloud_api.runs import examples
from cloud_api.runs.endpoints import RunPath
from cloud_api.strict_json import StrictJsonRoute
from persistence import run_moves
from protocol.errors import ErrorCode
from protocol.runs import Run, RunPause, RunRollback

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["runs"], route_class=StrictJsonRoute, dependencies=[OperatorOnly])

_MOVE = (ErrorCode.RUN_NOT_FOUND, ErrorCode.ILLEGAL_TRANSITION)


@router.post("/pause", summary="Pause a run", responses=answers(examples.PAUSED, OPERATOR, _MOVE, body=True))
def pause_run(
    session: WriteSession,
    now: Now,
    run_id: RunPath,
    request: Annotated[RunPause, Body(examples=[examples.PAUSE.model_dump(mode="json")])] = RunPause(),  # noqa: B008
) -> Run:
    """Hold a running run: no round opens or closes, nothing is offered, and its clock stands still.

    Devices may finish what they have, and workers what they do. Pausing a paused run changes nothing.
    """
    return run_moves.pause_run(session, run_id, request.reason, now)


@router.post("/resume", summary="Resume a run", responses=answers(examples.RUN, OPERATOR, _MOVE))
def resume_run(session: WriteSession, now: Now, run_id: RunPath) -> Run:
    """Let a paused run go on. Its round's deadlines move by the length of the pause.

    Resuming a running run changes nothing.
    """
    return run_moves.resume_run(session, run_id, now)


@router.post("/retry", summary="Retry a failed run", responses=answers(examples.RUN, OPERATOR, _MOVE))
def retry_run(session: WriteSession, now: Now, run_id: RunPath) -> Run:
    """Open the round that a run failed in again, as a new attempt from the same base; or prepare the run again.

    What was counted in the failed attempt is not counted again.
    """
    return run_moves.retry_run(session, run_id, now)


@router.post(
    "/rollback",
    summary="Roll a run back to a version",
    responses=answers(
        examples.RUN,
        OPERATOR,
        _MOVE,
        ErrorCode.VERSION_NOT_FOUND,
        ErrorCode.VERSION_NOT_PROMOTED,
        body=True,
    ),
)
def roll_back_run(
    session: WriteSession,
    now: Now,
    run_id: RunPath,
    request: Annotated[RunRollback, Body(examples=[examples.ROLLBACK.model_dump(mode="json")])],
) -> Run:
    """Let the next round start from an earlier promoted version. Later ones are marked as withdrawn, and kept.

    An unfinished round is abandoned and opened again from that version: at once, or when a paused run is resumed or a
    failed one retried. Rolling back to the newest version changes nothing.
    """
    return run_moves.roll_back_run(session, run_id, request.version, request.reason, now)
