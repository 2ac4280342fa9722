"""The outermost layer of every request: its id, its log line, the protocol's version, and the last net for faults.

Plain ASGI: Starlette's `BaseHTTPMiddleware` would copy every streamed body through a queue.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Callable

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import tracing
from cloud_api.problems import problem_response, request_facts
from cloud_api.request_metrics import RequestMetrics
from protocol import PROTOCOL_VERSION
from protocol.errors import ErrorCode
from protocol.headers import PROTOCOL_HEADER, REQUEST_ID_HEADER

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestBoundary:
    """Wraps the application.

    Args:
        stopping: whether the process ends; then a request that is cut short is told so.
        metrics: counts what was answered.
    """

    def __init__(self, app: ASGIApp, stopping: Callable[[], bool], metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        with structlog.contextvars.bound_contextvars(request_id=exchange.request_id):
            try:
                await self._serve(exchange, scope, receive)
            finally:
                exchange.log_end()
                self._metrics.observe(scope, exchange.status, exchange.seconds)

    async def _serve(self, exchange: "_Exchange", scope: Scope, receive: Receive) -> None:
        version = Headers(scope=scope).get(PROTOCOL_HEADER, PROTOCOL_VERSION)
        if version != PROTOCOL_VERSION:
            detail = f"this server speaks protocol version {PROTOCOL_VERSION}, the request says {version[:40]!r}"
            await exchange.refuse(ErrorCode.UNSUPPORTED_PROTOCOL, detail, receive, scope)
            return
        try:
            await self._app(scope, receive, exchange.send)
        except asyncio.CancelledError:
            # The server's patience at its end is over. The task ends here, so the cancellation needs no passing on.
            if exchange.status is not None or not self._stopping():
                raise
            await exchange.refuse(ErrorCode.UNAVAILABLE, "the server stops; try again soon", receive, scope)
        except Exception:
            log.exception("request_failed", method=scope["method"], path=_path_as_sent(scope))
            if exchange.status is not None:
                raise  # the answer has begun: all that is left is to cut the connection
            detail = f"a fault of the server; its log says more under request id {exchange.request_id}"
            await exchange.refuse(ErrorCode.INTERNAL_ERROR, detail, receive, scope)


class _Exchange:
    """One request and what became of it."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.status: int | None = None
        self._scope = scope
        self._send = send
        self._started = time.perf_counter()
        self._facts: dict[str, str] = {}
        request_facts.set(self._facts)
        scope["cotune_request_id"] = self.request_id

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._started

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on, with our headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID_HEADER] = self.request_id
            headers[PROTOCOL_HEADER] = PROTOCOL_VERSION
            # Now: the request's span ends with the last part of the answer.
            tracing.describe({"request_id": self.request_id, **self._scope.get("path_params", {}), **self._facts})
        await self._send(message)

    async def refuse(self, code: ErrorCode, detail: str, receive: Receive, scope: Scope) -> None:
        """Answer with a problem."""
        response = problem_response(code, detail, request_id=self.request_id)
        await response(scope, receive, self.send)

    def log_end(self) -> None:
        """Log the request: what changed something or went wrong for operators, the rest only when debugging."""
        status, method = self.status, self._scope["method"]
        quiet = method in {"GET", "HEAD"} and status is not None and status < 400
        write = log.debug if quiet else log.info
        milliseconds = round(self.seconds * 1000, 1)
        path = _path_as_sent(self._scope)
        write("request", method=method, path=path, status=status, milliseconds=milliseconds, **self._facts)


def _path_as_sent(scope: Scope) -> str:
    """Return the path with its %-escapes: decoded, it could hold what a terminal obeys."""
    raw: bytes = scope.get("raw_path") or b""
    return raw.decode("ascii", "backslashreplace") or str(scope["path"])
