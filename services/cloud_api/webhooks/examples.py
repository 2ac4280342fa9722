"""Webhooks as the documentation shows them."""

from cloud_api.devices.examples import TIME
from protocol.events import EventType
from protocol.pages import Page
from protocol.webhooks import CreatedWebhook, Webhook, WebhookCreate

WEBHOOK_ID = "whk_0197c0ffee00a1b2c3d4e5f60718"
REQUEST = WebhookCreate(
    url="https://ops.example/cotune", types=[EventType.RUN_STATUS_CHANGED, EventType.VERSION_CREATED]
)
WEBHOOK = Webhook(
    webhook_id=WEBHOOK_ID,
    url=REQUEST.url,
    types=REQUEST.types,
    run_id=None,
    note="",
    active=True,
    sequence=42,
    failures=0,
    delivered_at=TIME,
    created_at=TIME,
)
CREATED = CreatedWebhook(**WEBHOOK.model_dump(), secret="whsec_c2VjcmV0IG9mIHRoaXMgd2ViaG9vaywgMzIgYnl0ZXM=")
WEBHOOKS = Page[Webhook](items=[WEBHOOK], next_cursor=None)
