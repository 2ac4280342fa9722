"""Whether the process lives, and whether it can work."""

from fastapi import APIRouter
from starlette.responses import Response

from cloud_api.cloud import Cloud
from cloud_api.dependencies import CloudHere
from cloud_api.documentation import answers
from cloud_api.release import VERSION
from cloud_api.threads import in_thread
from persistence import sweeping
from protocol import PROTOCOL_VERSION
from protocol.errors import DomainError
from protocol.health import Health, Readiness

router = APIRouter(tags=["service"])

_HEALTH = Health(version=VERSION, protocol=PROTOCOL_VERSION)
_READY = Readiness(status="ready", checks={"database": "ok", "blobs": "ok", "queue": "ok", "controller": "ok"})
_NOT_READY = Readiness(
    status="not_ready",
    checks={
        "database": "the database does not answer: timeout",
        "blobs": "ok",
        "queue": "ok",
        "controller": "the database does not answer: timeout",
    },
)


@router.get("/health", summary="Whether the process answers", responses=answers(_HEALTH))
async def health() -> Health:
    """Answers as long as the process lives, whatever becomes of its dependencies. For liveness probes."""
    return _HEALTH


@router.get(
    "/ready",
    summary="Whether the service can work",
    responses=answers(
        _READY,
        also={
            503: {
                "description": "Not ready; `checks` says why. (A `Problem` where the server stops.)",
                "model": Readiness,
                "content": {"application/json": {"example": _NOT_READY.model_dump(mode="json")}},
            }
        },
    ),
)
async def ready(cloud: CloudHere, response: Response) -> Readiness:
    """Checks the database, the blob store, the queue, and whether a controller sweeps. For readiness probes.

    A queue that does not answer, or a sweep that nobody does, is named, and does not make the service unready: jobs and
    deadlines wait in the database until it is done again.
    """
    checks = await cloud.checks.get(lambda: _check(cloud))
    works = checks["database"] == "ok" and checks["blobs"] == "ok"
    if not works:
        response.status_code = 503
        response.headers["Retry-After"] = "1"
    return Readiness(status="ready" if works else "not_ready", checks=checks)


async def _check(cloud: Cloud) -> dict[str, str]:
    return {
        "database": await in_thread(_database, cloud),
        "blobs": await in_thread(_blobs, cloud),
        "queue": await in_thread(cloud.dispatcher.check),
        "controller": await _controller(cloud),
    }


def _database(cloud: Cloud) -> str:
    try:
        cloud.database.ping()
    except DomainError as error:
        return error.detail
    return "ok"


async def _controller(cloud: Cloud) -> str:
    try:
        return await cloud.transactions.read_at_once(sweeping.missing_controller) or "ok"
    except DomainError as error:
        return error.detail


def _blobs(cloud: Cloud) -> str:
    try:
        cloud.blobs.check()
    except DomainError as error:
        return error.detail
    return "ok"
