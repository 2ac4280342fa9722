"""Tells webhooks of events: a thread of the controller.

Several controllers may run: a webhook is claimed by lease. Delivery to one receiver waits for no other receiver.
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta

import httpx
import structlog

from persistence import webhooks
from persistence.clock import DatabaseClock
from persistence.database import Database
from persistence.webhooks import Delivery
from protocol.errors import DomainError
from protocol.events import Event
from protocol.webhooks import ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, signature

TIMEOUT_SECONDS = 10.0
MOST_EVENTS = 20
"""Of one claim, so that a lease outlives the slowest receiver."""

LEASE = timedelta(seconds=MOST_EVENTS * TIMEOUT_SECONDS + 60)
RECEIVERS_AT_ONCE = 4
PATIENCE_SECONDS = 5.0
"""A receiver that takes longer for what was claimed gets the rest with the next claim, as the others wait for that."""

GONE = 410
LATER = frozenset({429, 503})
LONGEST_ANSWER_SHOWN = 200

log = structlog.get_logger("worker.webhook_sender")


class NotDelivered(Exception):
    """An attempt that failed; the message says how.

    Attributes:
        gone: the receiver wants nothing any more.
        wait: how long it asks to be left alone, None where it does not.
    """

    def __init__(self, reason: str, *, gone: bool = False, wait: timedelta | None = None) -> None:
        super().__init__(reason)
        self.gone = gone
        self.wait = wait


@dataclass(frozen=True)
class WebhookSender:
    """Delivers what is due.

    Attributes:
        http: without redirects, which would let a receiver send us anywhere.
        now: the time.
    """

    database: Database
    http: httpx.Client
    now: Callable[[], datetime]

    def send_due(self) -> int:
        """Deliver what is due, and return to how many webhooks there was something to deliver."""
        with self.database.transaction() as session:
            due = webhooks.claim_due(session, self.now(), lease=LEASE, most_events=MOST_EVENTS)
        if due:
            with ThreadPoolExecutor(min(len(due), RECEIVERS_AT_ONCE), thread_name_prefix="webhook") as pool:
                list(pool.map(self._deliver, due))
        return len(due)

    def _deliver(self, delivery: Delivery) -> None:
        last, started = delivery.events[-1].sequence, time.monotonic()
        for event in delivery.events:
            try:
                self._post(delivery, event)
            except NotDelivered as error:
                self._record_failure(delivery, error)
                return
            now = self.now()
            slow = time.monotonic() - started >= PATIENCE_SECONDS
            reached = delivery.seen if event.sequence == last else event.sequence
            due_at = now if slow or event.sequence == last else now + LEASE
            with self.database.transaction() as session:
                webhooks.record_delivered(session, delivery.webhook_id, reached, now, due_at=due_at)
            if slow:
                return

    def _post(self, delivery: Delivery, event: Event) -> None:
        body = event.model_dump_json().encode()
        delivery_id, timestamp = f"{delivery.webhook_id}.{event.sequence}", int(self.now().timestamp())
        headers = {
            "Content-Type": "application/json",
            ID_HEADER: delivery_id,
            TIMESTAMP_HEADER: str(timestamp),
            SIGNATURE_HEADER: signature(delivery.secret, delivery_id, timestamp, body),
        }
        try:
            # The answer's body is not read: it could be of any size.
            with self.http.stream("POST", delivery.url, content=body, headers=headers) as answer:
                _check(answer)
        # The last two: a host that is no name of one (`http://a..b/`) is found out only on the way.
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise NotDelivered(f"{type(error).__name__}: {error}"[:LONGEST_ANSWER_SHOWN]) from None

    def _record_failure(self, delivery: Delivery, error: NotDelivered) -> None:
        log.warning("webhook_failed", webhook_id=delivery.webhook_id, reason=str(error))
        with self.database.transaction() as session:
            if error.gone:
                webhooks.record_gone(session, delivery.webhook_id, str(error))
                return
            jitter = random.uniform(0.8, 1.2)
            webhooks.record_failure(
                session, delivery.webhook_id, str(error), self.now(), asked=error.wait, jitter=jitter
            )


def _check(answer: httpx.Response) -> None:
    status = answer.status_code
    if answer.is_success:
        return
    if status == GONE:
        raise NotDelivered("the receiver answered 410 Gone", gone=True)
    asked = answer.headers.get("Retry-After", "")
    wait = timedelta(seconds=min(int(asked[:9]), 3600)) if status in LATER and asked.isdecimal() else None
    raise NotDelivered(f"expected a status from 200 to 299, got {status}", wait=wait)


def start(database: Database, interval_seconds: float, stop: threading.Event) -> threading.Thread:
    """Deliver every `interval_seconds` until `stop`, in a thread of its own."""

    def run() -> None:
        with httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False) as http:
            clock = DatabaseClock(database)
            sender = WebhookSender(database, http, clock.now)
            while not stop.is_set():
                started = time.monotonic()
                try:
                    clock.refresh(database)
                    sender.send_due()
                except DomainError as error:
                    log.warning("webhooks_not_sent", reason=error.detail)
                except Exception:  # the top of a thread that must not end
                    log.exception("webhooks_failed")
                stop.wait(max(0.1, interval_seconds - (time.monotonic() - started)))

    thread = threading.Thread(target=run, name="webhooks", daemon=True)
    thread.start()
    return thread
