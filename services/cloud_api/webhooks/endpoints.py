"""Webhooks, for operators."""

from typing import Annotated

from fastapi import APIRouter, Body, Path

from cloud_api.dependencies import Cursor, Limit, Note, Now, OperatorOnly, ReadSession, WriteSession
from cloud_api.documentation import OPERATOR, answers
from cloud_api.strict_json import StrictJsonRoute
from cloud_api.webhooks import examples
from persistence import webhooks
from protocol.errors import ErrorCode
from protocol.pages import Page
from protocol.webhooks import CreatedWebhook, Webhook, WebhookCreate

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], route_class=StrictJsonRoute, dependencies=[OperatorOnly])

WebhookPath = Annotated[str, Path(max_length=64, description="The webhook's id.", examples=[examples.WEBHOOK_ID])]


@router.post(
    "",
    status_code=201,
    summary="Create a webhook",
    responses=answers(examples.CREATED, OPERATOR, ErrorCode.RUN_NOT_FOUND, status=201, body=True),
)
def create_webhook(
    session: WriteSession,
    now: Now,
    note: Note,
    request: Annotated[WebhookCreate, Body(examples=[examples.REQUEST.model_dump(mode="json")])],
) -> CreatedWebhook:
    """Have every event from now on sent to a server of yours, in order, each at least once.

    The signature is that of the Standard Webhooks specification; its secret is shown this once. Answer with a status
    from 200 to 299 within ten seconds; anything else is tried again, first after 5 seconds, at most an hour apart,
    for three days. `410` ends it. `webhook-id` is the same for every attempt at one event.
    """
    created = webhooks.create(session, request, now)
    note.subject = created.webhook_id
    note.data = {"url": created.url}
    return created


@router.get("", summary="List webhooks", responses=answers(examples.WEBHOOKS, OPERATOR))
def list_webhooks(session: ReadSession, cursor: Cursor = None, limit: Limit = 50) -> Page[Webhook]:
    """Every webhook and how its deliveries go, the oldest first, page by page."""
    return webhooks.list_webhooks(session, cursor=cursor, limit=limit)


@router.get(
    "/{webhook_id}",
    summary="Show a webhook",
    responses=answers(examples.WEBHOOK, OPERATOR, ErrorCode.WEBHOOK_NOT_FOUND),
)
def show_webhook(session: ReadSession, webhook_id: WebhookPath) -> Webhook:
    """One webhook: up to where it was told, and why it fails if it does."""
    return webhooks.get(session, webhook_id)


@router.post(
    "/{webhook_id}/resume",
    summary="Resume a webhook",
    responses=answers(examples.WEBHOOK, OPERATOR, ErrorCode.WEBHOOK_NOT_FOUND),
)
def resume_webhook(session: WriteSession, now: Now, webhook_id: WebhookPath) -> Webhook:
    """Try it again now, from the first event that it has not been told of."""
    return webhooks.resume(session, webhook_id, now)


@router.delete(
    "/{webhook_id}",
    summary="Delete a webhook",
    responses=answers(examples.WEBHOOK, OPERATOR, ErrorCode.WEBHOOK_NOT_FOUND),
)
def delete_webhook(session: WriteSession, webhook_id: WebhookPath) -> Webhook:
    """Tell it nothing any more, at once. The answer is what it was."""
    return webhooks.remove(session, webhook_id)
