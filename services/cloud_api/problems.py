"""Every error answer: `application/problem+json` with a stable code (RFC 9457), written here and nowhere else.

What is unexpected tells the client nothing but the request's id; the rest is in the log.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from protocol.errors import HTTP_STATUS, PROBLEM_MEDIA_TYPE, DomainError, ErrorCode, FieldProblem, Problem
from protocol.strategies import STRATEGIES

request_facts: ContextVar[dict[str, str]] = ContextVar("request_facts")
"""What the log line of the current request says besides. One dictionary a request, so that threads can add to it."""

LONGEST_VALUE = 200
"""Characters of a received value that are given back."""

_SECRET_FIELDS = frozenset({"token", "credential", "key"})

_RETRY_AFTER = {ErrorCode.UNAVAILABLE: "1", ErrorCode.DEVICE_NOT_APPROVED: "15"}
"""Seconds, where an error does not bring its own."""

_CODE_BY_STATUS = {
    400: ErrorCode.MALFORMED_REQUEST,
    401: ErrorCode.UNAUTHENTICATED,
    403: ErrorCode.FORBIDDEN,
    404: ErrorCode.NOT_FOUND,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    413: ErrorCode.BODY_TOO_LARGE,
    503: ErrorCode.UNAVAILABLE,
}
"""What the framework itself answers with."""

_IN_WORDS = {"missing": "expected a value, got none", "extra_forbidden": "there is no such field"}
"""What pydantic says in the words of its own models, by the type of its error."""

_NOT_AN_OBJECT = frozenset({"model_attributes_type", "model_type", "dict_type"})


class OtherBytes(HTTPException):
    """A body without the digest that came with it. FastAPI lets no other kind of error out of reading a body."""

    def __init__(self, expected: str, received: str) -> None:
        super().__init__(HTTP_STATUS[ErrorCode.DIGEST_MISMATCH])
        self.expected = expected
        self.received = received


def problem_type(code: ErrorCode) -> str:
    """Return the URI that names a kind of problem, and under which this server explains it."""
    return f"/problems/{code.value}"


def title(code: ErrorCode) -> str:
    """Return the code in words."""
    return code.value.replace("_", " ").capitalize()


def problem_response(
    code: ErrorCode,
    detail: str,
    *,
    request_id: str | None,
    expected: Any = None,
    received: Any = None,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the answer for an error."""
    status = HTTP_STATUS[code]
    request_facts.get({}).update(code=code.value, detail=detail)
    problem = Problem(
        type=problem_type(code),
        title=title(code),
        status=status,
        detail=detail,
        code=code,
        expected=expected,
        received=received,
        errors=list(errors),
        request_id=request_id,
    )
    added = dict(headers or {})
    if status == 401:
        added.setdefault("WWW-Authenticate", 'Bearer realm="cotune"')
    if code in _RETRY_AFTER:
        added.setdefault("Retry-After", _RETRY_AFTER[code])
    return Response(problem.model_dump_json(), status, added, PROBLEM_MEDIA_TYPE)


def add_handlers(app: FastAPI) -> None:
    """Make `app` answer every error as a problem. What is unexpected is caught in `request_boundary`."""
    app.add_exception_handler(DomainError, _domain_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OtherBytes, _other_bytes)


def _request_id(request: Request) -> str | None:
    return request.scope.get("cotune_request_id")


async def _domain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DomainError)
    return problem_response(
        error.code,
        error.detail,
        request_id=_request_id(request),
        expected=error.expected,
        received=error.received,
        headers=getattr(error, "headers", None),
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    fallback = ErrorCode.MALFORMED_REQUEST if error.status_code < 500 else ErrorCode.INTERNAL_ERROR
    code = _CODE_BY_STATUS.get(error.status_code, fallback)
    detail, headers = str(error.detail), error.headers
    match code:
        case ErrorCode.NOT_FOUND:
            path = request.url.path[:LONGEST_VALUE]
            detail = f"no such path: {path}; the API is under /v1, its documentation at /docs"
        case ErrorCode.METHOD_NOT_ALLOWED:
            allowed = ", ".join(_methods(request))
            headers = {"Allow": allowed}
            detail = f"expected one of the methods {allowed}, got {request.method}"
        case ErrorCode.BODY_TOO_LARGE:
            detail = "the request's body is larger than this operation takes"
        case ErrorCode.MALFORMED_REQUEST:
            detail = "the body is not JSON: expected UTF-8 text that a JSON parser accepts"
    return problem_response(code, detail, request_id=_request_id(request), headers=headers)


def _methods(request: Request) -> list[str]:
    """Return every method that the request's path takes; the framework names those of one route only."""
    allowed: set[str] = set()
    for context in iter_route_contexts(request.app.routes):
        if context.original_route.matches(request.scope)[0] is not Match.NONE:
            allowed |= context.methods or set()
    return sorted(allowed)


async def _other_bytes(request: Request, error: Exception) -> Response:
    assert isinstance(error, OtherBytes)
    detail = f"`Content-Digest` announced SHA-256 {error.expected}, the body has {error.received}"
    return problem_response(
        ErrorCode.DIGEST_MISMATCH,
        detail,
        request_id=_request_id(request),
        expected=error.expected,
        received=error.received,
    )


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    request_id = _request_id(request)
    for each in found:
        if each["type"] == "json_invalid":
            reason = each.get("ctx", {}).get("error", each["msg"])
            detail = f"the body is not JSON: {reason} at character {each['loc'][-1]}"
            return problem_response(ErrorCode.MALFORMED_REQUEST, detail, request_id=request_id)
        if each["type"] in _NOT_AN_OBJECT and isinstance(each.get("input"), bytes):
            came = request.headers.get("Content-Type", "none")[:LONGEST_VALUE]
            detail = f"expected a JSON object with Content-Type application/json, got Content-Type {came}"
            return problem_response(ErrorCode.MALFORMED_REQUEST, detail, request_id=request_id)
        if each["type"] == "union_tag_invalid" and tuple(each["loc"]) == ("body", "strategy"):
            return _unknown_strategy(each, request_id)
    errors = [_field_problem(each) for each in found]
    listed = "; ".join(map(_in_one_line, errors[:5]))
    more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
    return problem_response(ErrorCode.INVALID_FIELD, f"{listed}{more}", request_id=request_id, errors=errors)


def _unknown_strategy(error: Mapping[str, Any], request_id: str | None) -> Response:
    known, name = sorted(STRATEGIES), _shown(error["ctx"]["tag"])
    detail = f"unknown strategy {name!r}; expected one of {', '.join(known)}"
    field = FieldProblem(field="strategy.name", message=f"expected one of {', '.join(known)}", received=name)
    return problem_response(
        ErrorCode.UNKNOWN_STRATEGY, detail, request_id=request_id, expected=known, received=name, errors=[field]
    )


def _in_one_line(problem: FieldProblem) -> str:
    came = "" if problem.received is None else f", got {problem.received!r}"
    return f"{problem.field}: {problem.message}{came}"


def _field_problem(error: Mapping[str, Any]) -> FieldProblem:
    place = [str(_shown(part)) for part in error["loc"]]
    if len(place) > 1 and place[0] in {"body", "query", "path", "header"}:
        place = place[1:]
    if len(place) > 2 and place[0] == "strategy" and place[1] in STRATEGIES:
        del place[1]  # pydantic names the chosen strategy; in the JSON there is no such level
    received = None
    if error["type"] != "missing" and not _SECRET_FIELDS & set(place):
        received = _shown(error.get("input"))
    message = _IN_WORDS.get(error["type"], error["msg"])
    return FieldProblem(field=".".join(place), message=message, received=received)


def _shown(value: Any) -> Any:
    """Return a received value as it may be given back: short, and never a whole document."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent
        return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}…"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, Mapping) else type(value).__name__
