"""Webhooks: who is told of what, how far, and when it is tried again.

Each is told in order and at least once: the position moves on after the receiver has said that it has the event. A
sender claims a webhook by moving its `due_at` into the future; one that dies leaves it to be tried again then.
"""

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from persistence import events, paging
from persistence.identifiers import new_id
from persistence.operator_tables import WebhookRow
from persistence.run_endings import run_not_found
from persistence.table_base import shorten
from persistence.tables import RunRow
from protocol.errors import DomainError, ErrorCode
from protocol.events import Event, EventType
from protocol.pages import Page
from protocol.webhooks import SECRET_PREFIX, CreatedWebhook, Webhook, WebhookCreate

FIRST_WAIT = timedelta(seconds=5)
LONGEST_WAIT = timedelta(hours=1)
GIVEN_UP_AFTER = timedelta(days=3)
"""A webhook that has failed for so long is not tried any more."""


@dataclass(frozen=True)
class Delivery:
    """What a claimed webhook is to be told next.

    Attributes:
        events: what it wants, in order.
        seen: it has been told of everything up to here once `events` are delivered.
    """

    webhook_id: str
    url: str
    secret: str
    events: Sequence[Event]
    seen: int


def create(session: Session, request: WebhookCreate, now: datetime) -> CreatedWebhook:
    """Create a webhook that is told of what happens from now on.

    Raises:
        DomainError: RUN_NOT_FOUND.
    """
    if request.run_id is not None and session.get(RunRow, request.run_id) is None:
        raise run_not_found(request.run_id)
    row = WebhookRow(
        id=new_id("whk", now),
        url=request.url,
        secret=SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode(),
        types=None if request.types is None else sorted({each.value for each in request.types}),
        run_id=request.run_id,
        note=request.note,
        active=True,
        sequence=events.last_sequence(session),
        failures=0,
        due_at=now,
        created_at=now,
    )
    session.add(row)
    session.flush()
    return CreatedWebhook(**_webhook(row).model_dump(), secret=row.secret)


def get(session: Session, webhook_id: str) -> Webhook:
    """Return a webhook. Raises DomainError WEBHOOK_NOT_FOUND."""
    return _webhook(_find(session, webhook_id))


def list_webhooks(session: Session, *, cursor: str | None, limit: int) -> Page[Webhook]:
    """Return webhooks, the oldest first.

    Raises:
        DomainError: INVALID_FIELD (the cursor).
    """
    query = select(WebhookRow).order_by(WebhookRow.id)
    if cursor is not None:
        query = query.where(WebhookRow.id > paging.id_cursor(cursor, "whk"))
    rows, more = paging.take(session, query, limit)
    return Page[Webhook](items=[_webhook(row) for row in rows], next_cursor=rows[-1].id if more else None)


def remove(session: Session, webhook_id: str) -> Webhook:
    """Forget a webhook; return what it was. Raises DomainError WEBHOOK_NOT_FOUND."""
    row = _find(session, webhook_id)
    session.delete(row)
    return _webhook(row)


def resume(session: Session, webhook_id: str, now: datetime) -> Webhook:
    """Try a webhook again now, from where it stopped. Raises DomainError WEBHOOK_NOT_FOUND."""
    row = _find(session, webhook_id)
    row.active, row.due_at, row.failing_since, row.failures = True, now, None, 0
    session.flush()
    return _webhook(row)


def claim_due(session: Session, now: datetime, *, lease: timedelta, most_events: int) -> list[Delivery]:
    """Claim the webhooks that have something to be told and whose time has come.

    Args:
        lease: so long no other sender takes them.
        most_events: for each.
    """
    newest = events.last_sequence(session)
    due = select(WebhookRow).where(WebhookRow.active, WebhookRow.due_at <= now, WebhookRow.sequence < newest)
    deliveries = []
    for row in session.scalars(due.order_by(WebhookRow.id).with_for_update(skip_locked=True)):
        wanted = _wanted(session, row, most_events)
        if not wanted:
            row.sequence = newest  # nothing of what happened concerns it
            continue
        row.due_at = now + lease
        seen = wanted[-1].sequence if len(wanted) == most_events else newest
        deliveries.append(Delivery(row.id, row.url, row.secret, wanted, seen))
    return deliveries


def record_delivered(session: Session, webhook_id: str, sequence: int, now: datetime, *, due_at: datetime) -> None:
    """The receiver has every event up to `sequence`; the next is due at `due_at`."""
    values = {
        "sequence": sequence,
        "failures": 0,
        "failing_since": None,
        "last_error": None,
        "delivered_at": now,
        "due_at": due_at,
    }
    # Only forward: of two senders (a lease ran out) the slower one must not move it back.
    forward = update(WebhookRow).where(WebhookRow.id == webhook_id, WebhookRow.sequence <= sequence)
    session.execute(forward.values(values), execution_options={"synchronize_session": False})


def record_failure(
    session: Session, webhook_id: str, reason: str, now: datetime, *, asked: timedelta | None, jitter: float
) -> None:
    """An attempt failed: try again later, or give it up if it has failed for `GIVEN_UP_AFTER`.

    Args:
        asked: how long the receiver wants to be left alone, None where it does not say.
        jitter: about 1; receivers that failed together are not tried together for ever.
    """
    row = session.get(WebhookRow, webhook_id, populate_existing=True, with_for_update=True)
    if row is None:
        return
    wait = asked or min(LONGEST_WAIT, FIRST_WAIT * (1 << min(row.failures, 20)) * jitter)
    row.failures += 1
    row.failing_since = row.failing_since or now
    row.last_error, row.due_at = shorten(reason), now + wait
    if now - row.failing_since >= GIVEN_UP_AFTER:
        _give_up(row, f"given up after {row.failures} attempts; the last one: {reason}")


def record_gone(session: Session, webhook_id: str, reason: str) -> None:
    """The receiver wants nothing any more."""
    row = session.get(WebhookRow, webhook_id, populate_existing=True, with_for_update=True)
    if row is not None:
        _give_up(row, reason)


def _give_up(row: WebhookRow, reason: str) -> None:
    row.active, row.last_error = False, shorten(reason)


def _wanted(session: Session, row: WebhookRow, limit: int) -> list[Event]:
    return events.list_events(session, run_id=row.run_id, after=row.sequence, limit=limit, types=_types(row))


def _types(row: WebhookRow) -> list[EventType] | None:
    return None if row.types is None else [EventType(each) for each in row.types]


def _find(session: Session, webhook_id: str) -> WebhookRow:
    row = session.get(WebhookRow, webhook_id, populate_existing=True)
    if row is None:
        raise DomainError(ErrorCode.WEBHOOK_NOT_FOUND, f"no webhook {webhook_id!r}", received=webhook_id)
    return row


def _webhook(row: WebhookRow) -> Webhook:
    return Webhook(
        webhook_id=row.id,
        url=row.url,
        types=_types(row),
        run_id=row.run_id,
        note=row.note,
        active=row.active,
        sequence=row.sequence,
        failures=row.failures,
        last_error=row.last_error,
        next_attempt_at=row.due_at if row.active and row.failures else None,
        delivered_at=row.delivered_at,
        created_at=row.created_at,
    )
