"""Webhooks: a server of the operator's that is told of events as they happen.

Deliveries follow the Standard Webhooks specification: `webhook-id`, `webhook-timestamp` and `webhook-signature`, an
HMAC-SHA256 over `<id>.<timestamp>.<body>`. The body is one `Event`.
"""

import base64
import hashlib
import hmac
from typing import Annotated

from pydantic import AfterValidator, AnyHttpUrl, Field, StringConstraints, TypeAdapter, WithJsonSchema

from protocol.base import RequestModel, ResponseModel, Timestamp
from protocol.events import EventType

ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
SIGNATURE_HEADER = "webhook-signature"
SECRET_PREFIX = "whsec_"


def _check_url(url: str) -> str:
    # Kept as it was written: pydantic's own type would change it, and make it longer.
    _ANY_HTTP_URL.validate_python(url)
    return url


_ANY_HTTP_URL = TypeAdapter(AnyHttpUrl)
WebhookUrl = Annotated[
    str,
    StringConstraints(pattern=r"^https?://[^\s\x00-\x1f]+$", max_length=2000),
    AfterValidator(_check_url),
    WithJsonSchema({"type": "string", "format": "uri", "pattern": r"^https?://[^\s]+$", "maxLength": 2000}),
]


class WebhookCreate(RequestModel):
    """Ask to be told of events from now on."""

    url: WebhookUrl = Field(description="Gets a POST an event. Redirects are not followed.")
    types: list[EventType] | None = Field(default=None, min_length=1, description="Only these; default: every type.")
    run_id: str | None = Field(default=None, max_length=64, description="Only of this run; default: of everything.")
    note: str = Field(default="", max_length=200, description="For operators.")


class Webhook(ResponseModel):
    """A webhook, and how its deliveries go."""

    webhook_id: str
    url: str
    types: list[EventType] | None
    run_id: str | None
    note: str
    active: bool = Field(description="False: it was given up, as `last_error` says; `resume` starts it again.")
    sequence: int = Field(description="It has been told of every event that it wants up to this one.")
    failures: int = Field(description="Attempts in a row that failed.")
    last_error: str | None = None
    next_attempt_at: Timestamp | None = Field(default=None, description="Only while it fails.")
    delivered_at: Timestamp | None = Field(default=None, description="The last delivery.")
    created_at: Timestamp


class CreatedWebhook(Webhook):
    """A new webhook. Its secret is shown this once."""

    secret: str = Field(description="`whsec_<base64>`: the key of the signatures.")


def signature(secret: str, delivery_id: str, timestamp: int, body: bytes) -> str:
    """Return the value of `webhook-signature`: `v1,<base64 of HMAC-SHA256>`.

    Args:
        secret: `whsec_<base64>`.
        delivery_id: value of `webhook-id`; the same for every attempt at one event.
        timestamp: value of `webhook-timestamp`, seconds since 1970.
        body: as it is sent.
    """
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signed = b".".join([delivery_id.encode(), str(timestamp).encode(), body])
    return f"v1,{base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()}"
