"""What operators did, for admins."""

from typing import Annotated

from fastapi import APIRouter, Query

from cloud_api.audit import examples
from cloud_api.dependencies import Cursor, Limit, OperatorOnly, ReadSession
from cloud_api.documentation import OPERATOR, answers
from cloud_api.strict_json import StrictJsonRoute
from persistence import audit
from protocol.operators import AuditEntry
from protocol.pages import Page

router = APIRouter(prefix="/v1/audit", tags=["operators"], route_class=StrictJsonRoute, dependencies=[OperatorOnly])


@router.get("", summary="List the audit trail", responses=answers(examples.ENTRIES, OPERATOR))
def list_entries(
    *,
    session: ReadSession,
    cursor: Cursor = None,
    limit: Limit = 50,
    key_id: Annotated[str | None, Query(max_length=64, description="Only what this key did.")] = None,
    action: Annotated[str | None, Query(max_length=64, description="Only this, for example `run.stop`.")] = None,
    subject: Annotated[str | None, Query(max_length=200, description="Only what was done to this.")] = None,
) -> Page[AuditEntry]:
    """What operators changed or tried to change, the newest first: who, what, to what, when, and how it ended."""
    return audit.list_entries(session, cursor=cursor, limit=limit, key_id=key_id, action=action, subject=subject)
