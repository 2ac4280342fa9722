"""The page at `/docs`: Swagger UI, served from this process, since a device's network may not reach any other."""

from importlib.resources import files

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

STATIC = "/docs/static"


def install(app: FastAPI) -> None:
    """Add the page and its files to `app`, which must not have FastAPI's own."""
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    async def show_reference() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=str(app.openapi_url),
            title=f"{app.title} {app.version}",
            swagger_js_url=f"{STATIC}/swagger-ui-bundle.js",
            swagger_css_url=f"{STATIC}/swagger-ui.css",
            swagger_favicon_url=f"{STATIC}/favicon.png",
        )

    app.include_router(router)
    app.mount(STATIC, StaticFiles(directory=str(files("fastapi_offline").joinpath("static"))))
