"""Builds the application: routers, error answers, the outermost layer, the document."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from cloud_api import documentation, health, metrics, problem_pages, problems, reference
from cloud_api.artifacts import endpoints as artifacts
from cloud_api.assignments import endpoints as assignments
from cloud_api.audit import endpoints as audit
from cloud_api.cloud import Cloud
from cloud_api.devices import endpoints as devices
from cloud_api.devices import enrolment_endpoints as enrolment
from cloud_api.events import endpoints as events
from cloud_api.federations import endpoints as federations
from cloud_api.operators import endpoints as operators
from cloud_api.rate_limits import AddressLimit
from cloud_api.release import VERSION
from cloud_api.request_boundary import RequestBoundary
from cloud_api.rounds import endpoints as rounds
from cloud_api.runs import endpoints as runs
from cloud_api.runs import move_endpoints as run_moves
from cloud_api.updates import chunk_endpoints as chunks
from cloud_api.updates import endpoints as updates
from cloud_api.versions import endpoints as versions
from cloud_api.webhooks import endpoints as webhooks

# Routes are tried in this order: what devices call most comes first.
SUBJECTS = (
    assignments,
    updates,
    chunks,
    artifacts,
    devices,
    enrolment,
    runs,
    run_moves,
    rounds,
    versions,
    federations,
    events,
    webhooks,
    operators,
    audit,
    health,
    metrics,
)


def create_app(cloud: Cloud) -> FastAPI:
    """Return the application. It follows the event feed while it runs, and closes `cloud` at its end."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(cloud.feed.follow(), name="feed")
        writing = asyncio.create_task(cloud.board.write_down(), name="devices seen")
        cloud.dispatcher.warm_up()
        try:
            yield
        finally:
            cloud.feed.stop()
            await following
            writing.cancel()
            with suppress(asyncio.CancelledError):
                await writing
            cloud.close()

    app = FastAPI(
        title="Cotune",
        summary="Co-tunes a large language model with the small language models on people's devices.",
        description=documentation.DESCRIPTION,
        version=VERSION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        servers=[{"url": "/", "description": "This server."}],
        openapi_tags=[{"name": name, "description": text} for name, text in documentation.TAGS.items()],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # A generated client's functions are named after these.
        generate_unique_id_function=lambda route: route.name,
        lifespan=lifespan,
        telemetry={"tracing": cloud.settings.traced, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.cloud = cloud
    # What is added last is outermost.
    app.add_middleware(AddressLimit, limits=cloud.limits)
    app.add_middleware(RequestBoundary, stopping=lambda: cloud.feed.stopping, metrics=cloud.request_metrics)
    if cloud.settings.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(cloud.settings.trusted_proxies))
    problems.add_handlers(app)
    documentation.install(app)
    for subject in SUBJECTS:
        app.include_router(subject.router)
    app.include_router(problem_pages.router)
    reference.install(app)
    return app
