"""The OpenAPI document: what every operation says about its answers and errors, in one form.

`answers(...)` is what an endpoint gives as `responses`: an example of the good answer and, by status, every error code
that the operation can answer with. `install(app)` finishes the document.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from cloud_api.access import ACCESS
from cloud_api.problems import problem_type, title
from protocol.errors import HTTP_STATUS, PROBLEM_MEDIA_TYPE, ErrorCode, Problem
from protocol.headers import IDEMPOTENCY_KEY_HEADER, IDEMPOTENCY_REPLAYED_HEADER, REQUEST_ID_HEADER
from protocol.operators import OperatorRole

TAGS = {
    "enrolment": "How a device gets its identity: an operator makes a token, the device trades it for a credential.",
    "devices": "Enrolled devices, as operators see them and as they see themselves.",
    "assignments": "A device's share of a round: asking for it, telling how it goes, refusing it.",
    "updates": "What a device hands in: its parts as safetensors files, then the submission.",
    "artifacts": "Files by their SHA-256: proxy base, adapters, probe set. Ranges, ETags, digests.",
    "federations": "Which devices train together. A run belongs to one; a device may belong to several.",
    "runs": "Training jobs.",
    "rounds": "The rounds of a run, with each device's share.",
    "versions": "The model versions that rounds leave, and their adapters.",
    "events": "The append-only feed of everything that happened, as a list and as a stream.",
    "webhooks": "Servers of yours that are told of events as they happen.",
    "operators": "Operators' API keys and what was done with them.",
    "service": "Health, readiness and numbers for Prometheus. No credential needed.",
}

DESCRIPTION = f"""\
Cotune co-tunes a large language model in the cloud with the small language models on many devices.

**Who calls.** Operators send `Authorization: Bearer <operator key>`; a key has a role, viewer, operator or admin.
Devices send `Authorization: Bearer <credential>`, and sign each request (RFC 9421, RFC 9530) if they have a key.

**Errors** are `{PROBLEM_MEDIA_TYPE}` (RFC 9457). Switch on `code`: it is stable, `detail` is for people.
Every answer has `X-Request-ID`, which is also in the server's log; send your own to find a request again.

**Repeating.** Uploads and submissions are idempotent: the same content gets the same receipt, other content gets 409.
Every other `POST` is, with an `Idempotency-Key`. After `429` and `503`, wait for `Retry-After` and repeat.

**Versions.** Clients may send `Cotune-Protocol: 1`. Fields are only ever added: ignore those that you do not know.
"""

_WITH_BODY = (ErrorCode.MALFORMED_REQUEST, ErrorCode.DIGEST_MISMATCH, ErrorCode.BODY_TOO_LARGE)
_ALWAYS = (
    ErrorCode.INVALID_FIELD,
    ErrorCode.UNSUPPORTED_PROTOCOL,
    ErrorCode.RATE_LIMITED,
    ErrorCode.INTERNAL_ERROR,
    ErrorCode.UNAVAILABLE,
)
_SIGNED = (
    ErrorCode.SIGNATURE_REQUIRED,
    ErrorCode.SIGNATURE_INVALID,
    ErrorCode.SIGNATURE_EXPIRED,
    ErrorCode.REQUEST_REPLAYED,
)
OPERATOR = (ErrorCode.UNAUTHENTICATED, ErrorCode.FORBIDDEN, ErrorCode.DEVICE_REVOKED)
"""The codes of an operation for operators; a revoked device that tries it is told that it is revoked."""

DEVICE = (ErrorCode.UNAUTHENTICATED, *_SIGNED, ErrorCode.FORBIDDEN, ErrorCode.DEVICE_REVOKED)
"""The codes of an operation for devices."""

CALLER = (ErrorCode.UNAUTHENTICATED, *_SIGNED, ErrorCode.DEVICE_REVOKED)
"""The codes of an operation for both."""

_HEADER_NAMES = {
    "IdempotencyReplayed": IDEMPOTENCY_REPLAYED_HEADER,
    "RetryAfter": "Retry-After",
    "WWWAuthenticate": "WWW-Authenticate",
    "XRequestID": REQUEST_ID_HEADER,
}
_HEADERS: dict[str, Any] = {
    "IdempotencyReplayed": {
        "description": "`true`: an earlier request with the same `Idempotency-Key` got this answer.",
        "schema": {"type": "string", "const": "true"},
    },
    "RetryAfter": {
        "description": "Seconds to wait before the request is worth repeating.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
        "example": 2,
    },
    "WWWAuthenticate": {
        "description": "What credential is asked for.",
        "required": True,
        "schema": {"type": "string"},
        "example": 'Bearer realm="cotune"',
    },
    "XRequestID": {
        "description": "The request's id: the one that the client sent if it is usable, else a new one.",
        "required": True,
        "schema": {"type": "string"},
        "example": "5f1c2a9e0b7d4c31",
    },
}
"""Headers of answers, by their names in the document's components."""

_NULL = "\0null"
"""Stands for null in an example until the document is made: FastAPI leaves out every null, also those of examples."""

Responses = dict[int | str, dict[str, Any]]


def answers(
    example: BaseModel | list[BaseModel] | None,
    *codes: ErrorCode | Iterable[ErrorCode],
    status: int = 200,
    description: str | None = None,
    body: bool = False,
    also: Mapping[int, dict[str, Any]] | None = None,
) -> Responses:
    """Return an operation's `responses`.

    Args:
        example: the good answer, as it could be; None where it is not JSON (then say it in `also`).
        codes: every error code of this operation alone, or groups of them such as `OPERATOR`.
        status: the good answer's status.
        description: the good answer in words.
        body: whether the operation takes a JSON body.
        also: further answers that are not errors.
    """
    responses: Responses = {}
    if example is not None:
        responses[status] = {"content": {"application/json": {"example": _plain(example)}}}
        if description:
            responses[status]["description"] = description
    for good, response in (also or {}).items():
        responses[good] = response
        if response.get("model") is type(example):  # the same answer under another status
            responses[good] = {"content": responses[status]["content"]} | response
    possible: list[ErrorCode] = [*(_WITH_BODY if body else ()), *_ALWAYS]
    for each in codes:
        possible += [each] if isinstance(each, ErrorCode) else each
    for error_status in sorted({HTTP_STATUS[code] for code in possible}):
        here = [code for code in dict.fromkeys(possible) if HTTP_STATUS[code] == error_status]
        responses[error_status] = _and_also(_problem_answer(error_status, here), responses.get(error_status, {}))
    return responses


def with_code(responses: Responses, code: ErrorCode) -> Responses:
    """Return `responses` with one more error code."""
    status = HTTP_STATUS[code]
    content = responses.get(status, {}).get("content", {}).get(PROBLEM_MEDIA_TYPE, {})
    codes = [ErrorCode(each) for each in content.get("examples", {})]
    return responses | {status: _problem_answer(status, [*codes, *([] if code in codes else [code])])}


def _and_also(problem: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return an answer that is either a problem or `other`, told apart by the media type."""
    if not other:
        return problem
    description = f"{other['description']} Or {problem['description']}"
    return other | {"description": description, "content": other["content"] | problem["content"]}


def _plain(example: BaseModel | list[BaseModel]) -> Any:
    if isinstance(example, list):
        return [_plain(each) for each in example]
    return _changed(example.model_dump(mode="json"), None, _NULL)


def _changed(value: Any, old: Any, new: Any) -> Any:
    """Return JSON with each value `old` replaced, at any depth."""
    if isinstance(value, dict):
        return {name: _changed(each, old, new) for name, each in value.items()}
    if isinstance(value, list):
        return [_changed(each, old, new) for each in value]
    return new if value == old else value


def _problem_answer(status: int, codes: list[ErrorCode]) -> dict[str, Any]:
    names = ", ".join(f"`{code.value}`" for code in codes)
    return {
        "description": f"{HTTPStatus(status).phrase}: {names}.",
        "content": {
            PROBLEM_MEDIA_TYPE: {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "examples": {code.value: {"summary": title(code), "value": _problem(code)} for code in codes},
            }
        },
    }


def _problem(code: ErrorCode) -> dict[str, Any]:
    problem = Problem(
        type=problem_type(code),
        title=title(code),
        status=HTTP_STATUS[code],
        detail="what was expected, and what came",
        code=code,
        request_id="5f1c2a9e0b7d4c31",
    )
    return dict(_plain(problem))


def _headers(status: str, operation: Mapping[str, Any]) -> dict[str, Any]:
    """The headers that an answer with this status has whatever the operation."""
    names = ["XRequestID"]
    if status == "401":
        names.append("WWWAuthenticate")
    if status in {"429", "503"}:
        names.append("RetryAfter")
    keyed = any(each["name"] == IDEMPOTENCY_KEY_HEADER for each in operation.get("parameters", []))
    if keyed and status.startswith("2"):
        names.append("IdempotencyReplayed")
    return {_HEADER_NAMES[name]: {"$ref": f"#/components/headers/{name}"} for name in names}


def install(app: FastAPI) -> None:
    """Make `app` serve the finished document, built once when it is first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
        license_info=app.license_info,
        servers=app.servers,
    )
    document: dict[str, Any] = _changed(made, _NULL, None)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            access = ACCESS.get(f"{method.upper()} {path}")
            if access is not None and access.role is not None:
                more = "" if access.role is OperatorRole.ADMIN else " or more"
                operation["description"] += f"\n\nFor operators with the role {access.role}{more}."
            for status, answer in operation["responses"].items():
                named = {**answer.get("headers", {}), **_headers(status, operation)}
                answer["headers"] = dict(sorted(named.items()))
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(problem.pop("$defs", {}))
    schemas["Problem"] = problem
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    document["components"]["headers"] = _HEADERS
    return document
