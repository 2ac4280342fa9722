"""Requests to the API as an operator, with every failure as one of our errors and what to do next."""

import ssl
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from command_line.errors import BadInput, CommandError, NotAuthorised, Refused, Unreachable
from protocol import PROTOCOL_VERSION
from protocol.errors import ErrorCode, Problem
from protocol.headers import PROTOCOL_HEADER
from protocol.pages import Page

Schema = TypeVar("Schema", bound=BaseModel)

LARGEST_PAGE = 200
"""Most items that the API puts on one page."""

NEXT_STEPS = {
    ErrorCode.UNAUTHENTICATED: "check COTUNE_OPERATOR_KEY or COTUNE_OPERATOR_KEY_FILE",
    ErrorCode.FORBIDDEN: "use the key of such an operator; an admin makes one with `cotune operator key create`",
    ErrorCode.NOT_FOUND: "check --server and COTUNE_SERVER; a server older than this command may not know the request",
    ErrorCode.RUN_NOT_FOUND: "`cotune run list` shows every run",
    ErrorCode.ROUND_NOT_FOUND: "`cotune round list` shows the rounds of a run",
    ErrorCode.VERSION_NOT_FOUND: "`cotune model list` shows the versions of a run",
    ErrorCode.VERSION_NOT_PROMOTED: "`cotune model list` shows which versions of the run were promoted",
    ErrorCode.ARTIFACT_NOT_FOUND: "`cotune model show` shows which adapters a version has",
    ErrorCode.DEVICE_NOT_FOUND: "`cotune device list` shows every device",
    ErrorCode.ENROLMENT_TOKEN_NOT_FOUND: "`cotune device tokens` shows every token",
    ErrorCode.FEDERATION_NOT_FOUND: "`cotune federation list` shows every federation",
    ErrorCode.WEBHOOK_NOT_FOUND: "`cotune webhook list` shows every webhook",
    ErrorCode.OPERATOR_KEY_NOT_FOUND: "`cotune operator key list` shows every key",
}
"""What helps after a refusal, where the refusal does not say it itself."""


class Transport:
    """Speaks HTTP with the API and reads its answers as schemas of the protocol. Use as a context manager.

    Every method raises Unreachable when the API does not answer, NotAuthorised when it does not accept the
    key, and Refused when it says no.
    """

    def __init__(
        self, server: str, key: str, *, timeout_seconds: float = 15.0, tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"expected a server address such as http://127.0.0.1:8000, got {server!r}")
        self.server = server.rstrip("/")
        # The machine's proxy settings are for the world outside; a service on this machine is reached directly.
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            base_url=self.server,
            headers={"Authorization": f"Bearer {key}", PROTOCOL_HEADER: PROTOCOL_VERSION},
            timeout=timeout_seconds,
            trust_env=not local,
            verify=True if tls is None else tls,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def call(self, method: str, path: str, schema: type[Schema], **arguments: Any) -> Schema:
        """Return the answer to one request. `arguments` are httpx's."""
        return self.parse(self.request(method, path, **arguments), schema)

    def items(self, path: str, schema: type[Schema], *, most: int | None = None, **filters: str | None) -> list[Schema]:
        """Return a list page by page: all of it, or the first `most` items. A filter of None is left out."""
        found: list[Schema] = []
        params: dict[str, str | int] = {name: value for name, value in filters.items() if value is not None}
        while True:
            params["limit"] = LARGEST_PAGE if most is None else min(LARGEST_PAGE, most - len(found))
            page = self.call("GET", path, Page[schema], params=params)  # type: ignore[valid-type]
            found += page.items
            if page.next_cursor is None or len(found) == most:
                return found
            params["cursor"] = page.next_cursor

    def download(self, path: str, file: BinaryIO) -> None:
        """Write the content of an answer into `file` as it comes: memory does not grow with it."""
        try:
            with self._http.stream("GET", path) as response:
                if not response.is_success:
                    response.read()
                    raise self._failure(response)
                for chunk in response.iter_bytes():
                    file.write(chunk)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Return an answer that is a success."""
        response = self.send(method, path, **arguments)
        if response.is_success:
            return response
        raise self._failure(response)

    def send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Return any answer. Raises Unreachable only."""
        try:
            return self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def parse(self, response: httpx.Response, schema: type[Schema]) -> Schema:
        """Read an answer. Raises Unreachable: it is not what a Cotune API says."""
        try:
            return schema.model_validate_json(response.content)
        except ValidationError:
            raise Unreachable(
                f"expected a Cotune API at {self.server}, got an answer of {response.status_code} that is not one",
                next_step="check --server and COTUNE_SERVER",
            ) from None

    def _unreachable(self, error: httpx.HTTPError) -> Unreachable:
        return Unreachable(
            f"cannot reach the API at {self.server}: {error or type(error).__name__}",
            next_step="start it with `cotune up`, or give its address with --server or COTUNE_SERVER",
        )

    def _failure(self, response: httpx.Response) -> CommandError:
        try:
            problem = Problem.model_validate_json(response.content)
        except ValidationError:
            return Unreachable(f"{self.server} answered {response.status_code} {response.reason_phrase}")
        message = problem.detail
        if problem.code is ErrorCode.INVALID_FIELD and problem.errors:  # of which the detail names the first only
            lines = [
                f"  {each.field}: {each.message}" + ("" if each.received is None else f", got {each.received!r}")
                for each in problem.errors
            ]
            message = "\n".join([f"{len(lines)} wrong field(s)", *lines])
        next_step = NEXT_STEPS.get(problem.code)
        if response.status_code in (401, 403):
            return NotAuthorised(message, next_step=next_step)
        if response.status_code >= 500:
            return Unreachable(f"{message} (request {problem.request_id or '?'})")
        return Refused(message, code=problem.code, next_step=next_step)


def segment(value: str) -> str:
    """Return `value` as one part of a path, whatever is in it."""
    return quote(value, safe="")
