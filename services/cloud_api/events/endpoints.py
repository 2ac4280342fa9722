"""Events, for operators."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from starlette.responses import StreamingResponse

from cloud_api.authentication import authenticate_operator
from cloud_api.dependencies import CloudHere, OperatorKey, OperatorOnly, ReadSession
from cloud_api.documentation import OPERATOR, answers
from cloud_api.events import examples
from cloud_api.events.stream import look, stream
from cloud_api.runs.endpoints import RunPath
from cloud_api.strict_json import StrictJsonRoute
from persistence import events, runs
from protocol.errors import ErrorCode
from protocol.events import Event
from protocol.pages import Page

router = APIRouter(
    prefix="/v1/runs/{run_id}/events", tags=["events"], route_class=StrictJsonRoute, dependencies=[OperatorOnly]
)

LARGEST_SEQUENCE = 2**63 - 1
After = Annotated[
    int,
    Query(
        ge=0, le=LARGEST_SEQUENCE, description="`sequence` of the last event that the client has; 0: from the start."
    ),
]

# `itemSchema` is OpenAPI's since 3.2 (and FastAPI's for streams); before, nothing says what one event looks like.
_STREAM = {
    "itemSchema": {
        "type": "object",
        "required": ["id", "event", "data"],
        "properties": {
            "id": {"type": "string", "pattern": "^[0-9]+$"},
            "event": {"$ref": "#/components/schemas/EventType"},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"$ref": "#/components/schemas/Event"},
            },
        },
    },
    "example": examples.STREAM,
}


@router.get("", summary="List events", responses=answers(examples.EVENTS, OPERATOR, ErrorCode.RUN_NOT_FOUND))
def list_events(
    session: ReadSession,
    run_id: RunPath,
    after: After = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most events on the page.")] = 100,
) -> Page[Event]:
    """What happened in the run, oldest first. Give `next_cursor` as `after` for more; null: there is no more yet."""
    runs.get_run(session, run_id)
    found = events.list_events(session, run_id=run_id, after=after, limit=limit)
    return Page[Event](items=found, next_cursor=str(found[-1].sequence) if len(found) == limit else None)


@router.get(
    "/stream",
    summary="Stream events",
    response_class=StreamingResponse,
    responses=answers(
        None,
        OPERATOR,
        ErrorCode.RUN_NOT_FOUND,
        also={
            200: {
                "description": "Server-sent events; `id` is the sequence, `event` the type, `data` an `Event` as JSON.",
                "content": {
                    "text/event-stream": _STREAM,
                },
            },
            204: {"description": "The run is over and the client has every event: it need not come back."},
        },
    ),
)
async def stream_events(
    cloud: CloudHere,
    presented: OperatorKey,
    run_id: RunPath,
    after: After = 0,
    last_event_id: Annotated[
        int | None,
        Header(
            alias="Last-Event-ID",
            ge=0,
            le=LARGEST_SEQUENCE,
            description="As `after`; browsers send it when they come back.",
        ),
    ] = None,
) -> Response:
    """What happens in the run, as it happens; first what happened after `Last-Event-ID` or `after`.

    A comment every 15 seconds keeps the connection open. The stream ends when the run is over, or the key is void.
    """
    start = after if last_event_id is None else last_event_id
    now = await cloud.read(lambda session: look(session, run_id, start))
    if now.finished and start > 0:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        stream(cloud, run_id, start, lambda session: authenticate_operator(session, cloud, presented)),
        media_type="text/event-stream",
        headers=headers,
    )
