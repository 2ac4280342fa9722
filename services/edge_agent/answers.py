"""The server's answers as messages; what is none, and what this device is too old for."""

from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from edge_agent.errors import CloudUnavailable, UnknownStrategy
from protocol.assignments import Assignment, AssignmentName

Schema = TypeVar("Schema", bound=BaseModel)


def parse_answer(response: httpx.Response, schema: type[Schema]) -> Schema:
    """Read an answer's body. Raises `CloudUnavailable` if it is something else: a proxy's page, a half of one."""
    try:
        return schema.model_validate_json(response.content)
    except ValidationError as error:
        raise CloudUnavailable(
            f"{response.request.url.path}: expected a {schema.__name__}, got another body: {_first(error)}"
        ) from None


_NAMED_BY_STRATEGIES = frozenset({"strategy", "uploads", "optional_uploads", "upload_limits"})
"""Fields of an assignment that hold names of its strategy's, which a newer server may know more of."""


def parse_assignment(response: httpx.Response) -> Assignment:
    """Read an assignment.

    Raises:
        UnknownStrategy: it is one, but its strategy, a setting of it or a part that it sends is not known here.
        CloudUnavailable: see `parse_answer`.
    """
    try:
        return Assignment.model_validate_json(response.content)
    except ValidationError as error:
        if any(_NAMED_BY_STRATEGIES.isdisjoint(each["loc"][:1]) for each in error.errors(include_input=False)):
            return parse_answer(response, Assignment)
        raise UnknownStrategy(parse_answer(response, AssignmentName), _first(error)) from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
