"""Builds the application: routers, error answers, the outermost layer, the document."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from cloud_api import documentation, health, problems
from cloud_api.artifacts import endpoints as artifacts
from cloud_api.assignments import endpoints as assignments
from cloud_api.cloud import Cloud
from cloud_api.devices import endpoints as devices
from cloud_api.devices import enrolment_endpoints as enrolment
from cloud_api.events import endpoints as events
from cloud_api.federations import endpoints as federations
from cloud_api.release import VERSION
from cloud_api.request_boundary import RequestBoundary
from cloud_api.rounds import endpoints as rounds
from cloud_api.runs import endpoints as runs
from cloud_api.runs import move_endpoints as run_moves
from cloud_api.updates import endpoints as updates
from cloud_api.versions import endpoints as versions

# Routes are tried in this order: what devices call most comes first.
SUBJECTS = (
    assignments,
    updates,
    artifacts,
    devices,
    enrolment,
    runs,
    run_moves,
    rounds,
    versions,
    federations,
    events,
    health,
)


def create_app(cloud: Cloud) -> FastAPI:
    """Return the application. It follows the event feed while it runs, and closes `cloud` at its end."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(cloud.feed.follow(), name="feed")
        cloud.dispatcher.warm_up()
        try:
            yield
        finally:
            cloud.feed.stop()
            await following
            cloud.close()

    app = FastAPI(
        title="Cotune",
        summary="Co-tunes a large language model with the small language models on people's devices.",
        description=documentation.DESCRIPTION,
        version=VERSION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        servers=[{"url": "/", "description": "This server."}],
        openapi_tags=[{"name": name, "description": text} for name, text in documentation.TAGS.items()],
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.cloud = cloud
    app.add_middleware(RequestBoundary, stopping=lambda: cloud.feed.stopping)
    problems.add_handlers(app)
    documentation.install(app)
    for subject in SUBJECTS:
        app.include_router(subject.router)
    return app
