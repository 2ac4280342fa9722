"""Operators' API keys, for admins."""

from typing import Annotated

from fastapi import APIRouter, Body, Path

from cloud_api.dependencies import (
    Cursor,
    Limit,
    Note,
    Now,
    OperatorHere,
    OperatorOnly,
    ReadSession,
    WriteSession,
)
from cloud_api.documentation import OPERATOR, answers
from cloud_api.operators import examples
from cloud_api.strict_json import StrictJsonRoute
from persistence import operators
from protocol.errors import ErrorCode
from protocol.operators import OperatorKey, OperatorKeyCreate, OperatorKeyCreated
from protocol.pages import Page

router = APIRouter(
    prefix="/v1/operators/keys", tags=["operators"], route_class=StrictJsonRoute, dependencies=[OperatorOnly]
)


@router.post(
    "",
    status_code=201,
    summary="Create an operator key",
    responses=answers(examples.CREATED, OPERATOR, status=201, body=True),
)
def create_key(
    session: WriteSession,
    now: Now,
    note: Note,
    operator: OperatorHere,
    request: Annotated[OperatorKeyCreate, Body(examples=[examples.KEY_REQUEST.model_dump(mode="json")])],
) -> OperatorKeyCreated:
    """Make a key for a person or a program. It is shown this once; give each its own, with the least role."""
    created = operators.create_key(session, request, operator.key_id, now)
    note.subject = created.key_id
    note.data = {"name": created.name, "role": created.role.value}
    return created


@router.get("", summary="List operator keys", responses=answers(examples.KEYS, OPERATOR))
def list_keys(session: ReadSession, cursor: Cursor = None, limit: Limit = 50) -> Page[OperatorKey]:
    """Every key in the order of creation, also those that are void; without their secrets."""
    return operators.list_keys(session, cursor=cursor, limit=limit)


@router.delete(
    "/{key_id}",
    summary="Revoke an operator key",
    responses=answers(examples.KEY, OPERATOR, ErrorCode.OPERATOR_KEY_NOT_FOUND),
)
def revoke_key(
    session: WriteSession,
    now: Now,
    key_id: Annotated[str, Path(max_length=64, examples=[examples.KEY_ID], description="The key's id.")],
) -> OperatorKey:
    """Void a key for ever: its next request is refused. Revoking it again changes nothing."""
    return operators.revoke_key(session, key_id, now)
