"""`Idempotency-Key` on every POST: a request that comes again gets the answer that it got.

A POST endpoint that writes takes a `session`; around it the key is claimed and the answer recorded in that session, so
in the one transaction of what the endpoint does. See `persistence.idempotency`.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from cloud_api.dependencies import Now
from persistence import idempotency
from persistence.errors import CommittedRefusal
from persistence.idempotency import Answer, KeyedRequest
from protocol.headers import IDEMPOTENCY_KEY_HEADER, IDEMPOTENCY_REPLAYED_HEADER

Endpoint = Callable[..., Any]

_DESCRIPTION = (
    "Chosen by the client, new for each new request, best a UUID. The same request with the same key does nothing for "
    f"24 hours and gets the same answer, with `{IDEMPOTENCY_REPLAYED_HEADER}: true`; another request with it gets 409."
)
_Key = Annotated[
    str | None,
    Header(
        alias=IDEMPOTENCY_KEY_HEADER,
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description=_DESCRIPTION,
        examples=["6f1c7f0e-5a4b-4a39-9c55-1d3a3b1f2a77"],
    ),
]


async def _keyed_request(request: Request, key: _Key = None) -> KeyedRequest | None:
    if key is None:
        return None
    path = request.scope.get("raw_path") or request.url.path.encode()
    content = b"\n".join([request.method.encode(), path, request.scope.get("query_string", b""), await request.body()])
    return KeyedRequest(request.headers.get("Authorization", ""), key, content)


_Keyed = Annotated[KeyedRequest | None, Depends(_keyed_request)]


def repeats_by_content(endpoint: Endpoint) -> Endpoint:
    """Mark a POST endpoint that needs no key: the same content again gets the same answer by itself."""
    endpoint.repeats_by_content = True  # type: ignore[attr-defined]
    return endpoint


def repeatable(endpoint: Endpoint, status_code: int) -> Endpoint:
    """Return a POST endpoint that also takes an `Idempotency-Key`.

    Args:
        endpoint: a plain function with a `session` that writes; it returns a model.
        status_code: of its answer where it sets no other one.

    Raises:
        TypeError: the endpoint has no session, or is not a plain function: its answer could not be kept with its work.
    """
    signature = inspect.signature(endpoint)
    if "keyed_request" in signature.parameters or hasattr(endpoint, "repeats_by_content"):
        return endpoint  # FastAPI makes a router's routes anew when the router is included
    if "session" not in signature.parameters or inspect.iscoroutinefunction(endpoint):
        raise TypeError(f"expected a POST endpoint that is a plain function with a `session`, got {endpoint.__name__}")
    own_response = "response" in signature.parameters
    added = {"keyed_request": _Keyed, "answered_at": Now} | ({} if own_response else {"response": Response})

    @wraps(endpoint)
    def answer(**arguments: Any) -> Any:
        request, now = arguments.pop("keyed_request"), arguments.pop("answered_at")
        response: Response = arguments["response"] if own_response else arguments.pop("response")
        session: Session = arguments["session"]
        if request is None:
            return endpoint(**arguments)
        known = idempotency.claim(session, request, now)
        if known is not None:
            headers = {IDEMPOTENCY_REPLAYED_HEADER: "true"}
            return Response(known.body, known.status, headers, "application/json")
        try:
            result: BaseModel = endpoint(**arguments)
        except CommittedRefusal:
            # Its transaction is kept, and a claim without an answer must not be: the repetition is refused by itself.
            idempotency.release(session, request)
            raise
        status = response.status_code or status_code
        idempotency.record(session, request, Answer(status, result.model_dump_json().encode()))
        return result

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in signature.parameters.values()]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
        for name, annotation in added.items()
    ]
    # First, so that the body is read before the session is open: nobody waits for a slow sender in a transaction.
    answer.__signature__ = signature.replace(parameters=[*more, *parameters])  # type: ignore[attr-defined]
    return answer
