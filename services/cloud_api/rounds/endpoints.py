"""Rounds, for operators."""

from typing import Annotated

from fastapi import APIRouter, Path, Query

from cloud_api.dependencies import Cursor, Limit, Now, OperatorOnly, ReadSession
from cloud_api.documentation import OPERATOR, answers
from cloud_api.rounds import examples
from cloud_api.runs.endpoints import RunPath
from cloud_api.strict_json import StrictJsonRoute
from persistence import rounds
from protocol.errors import ErrorCode
from protocol.pages import Page
from protocol.runs import Round

router = APIRouter(
    prefix="/v1/runs/{run_id}/rounds", tags=["rounds"], route_class=StrictJsonRoute, dependencies=[OperatorOnly]
)


@router.get("", summary="List rounds", responses=answers(examples.ROUNDS, OPERATOR, ErrorCode.RUN_NOT_FOUND))
def list_rounds(
    session: ReadSession, now: Now, run_id: RunPath, cursor: Cursor = None, limit: Limit = 50
) -> Page[Round]:
    """The run's rounds and each attempt at them, the newest first, with their devices and what was measured."""
    return rounds.list_rounds(session, run_id, cursor=cursor, limit=limit, now=now)


@router.get(
    "/{number}",
    summary="Show a round",
    responses=answers(examples.ROUND, OPERATOR, ErrorCode.RUN_NOT_FOUND, ErrorCode.ROUND_NOT_FOUND),
)
def show_round(
    session: ReadSession,
    now: Now,
    run_id: RunPath,
    number: Annotated[int, Path(ge=1, description="1 is the first round.", examples=[1])],
    attempt: Annotated[int | None, Query(ge=1, description="Which attempt at it; absent: the newest.")] = None,
) -> Round:
    """One round: its stage, every device's share of it with steps and losses, and what was measured so far."""
    return rounds.get_round(session, run_id, number, attempt=attempt, now=now)
