"""The route class of every router: a bounded body, that which `Content-Digest` names, JSON as RFC 8259 defines it, and
POST that can be repeated.

FastAPI's own limit answers in plain text, and Python's parser also takes `NaN` and `Infinity`.
"""

import hashlib
import json
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from cloud_api.documentation import with_code
from cloud_api.idempotency import repeatable
from cloud_api.problems import OtherBytes
from protocol.errors import ErrorCode
from protocol.headers import CONTENT_DIGEST_HEADER, parse_content_digest

LARGEST_JSON_BYTES = 2**20
"""Body of an operation that takes JSON. Files are streamed and have their own limits."""


class StrictJsonRequest(Request):
    """A request whose `body` is bounded and whose `json` refuses what is not JSON."""

    async def body(self) -> bytes:
        """Return the whole body.

        Raises:
            HTTPException: 413, before more than the limit is kept; `OtherBytes`, also for a digest that is none.
        """
        if not hasattr(self, "_body"):
            announced = self.headers.get("Content-Length", "0")
            if announced.isdigit() and int(announced[:18]) > LARGEST_JSON_BYTES:
                raise HTTPException(413)
            body = bytearray()
            async with aclosing(self.stream()) as chunks:
                async for chunk in chunks:
                    body += chunk
                    if len(body) > LARGEST_JSON_BYTES:
                        raise HTTPException(413)
            self._check_digest(body)
            self._body = bytes(body)
        return self._body

    def _check_digest(self, body: bytearray) -> None:
        header = self.headers.get(CONTENT_DIGEST_HEADER)
        if header is None:
            return
        try:
            expected = parse_content_digest(header)
        except ValueError:
            expected = "unreadable"
        received = hashlib.sha256(body).hexdigest()
        if received != expected:
            raise OtherBytes(expected, received)

    async def json(self) -> Any:
        """Return the parsed body. Raises json.JSONDecodeError."""
        if not hasattr(self, "_json"):
            text = (await self.body()).decode()

            def refuse(constant: str) -> NoReturn:
                raise json.JSONDecodeError(f"{constant} is not JSON", text, max(text.find(constant), 0))

            self._json = json.loads(text, parse_constant=refuse)
        return self._json


class StrictJsonRoute(APIRoute):
    """A route that gives its endpoint such a request; a POST takes an `Idempotency-Key`."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if "POST" in (options.get("methods") or ()):
            endpoint = repeatable(endpoint, options.get("status_code") or 200)
            if not hasattr(endpoint, "repeats_by_content"):
                options["responses"] = with_code(options.get("responses") or {}, ErrorCode.IDEMPOTENCY_KEY_REUSED)
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the request."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return strict
