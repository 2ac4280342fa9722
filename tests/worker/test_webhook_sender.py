"""Webhooks: every event once in order, whatever the receiver and the network do."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from persistence import events, webhooks
from persistence.webhooks import GIVEN_UP_AFTER, LONGEST_WAIT
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.webhooks import CreatedWebhook, Webhook, WebhookCreate
from tests.worker.cloud import Cloud
from worker import webhook_sender
from worker.webhook_sender import MOST_EVENTS, WebhookSender


@dataclass
class Receiver:
    """A server that answers as it is told to and remembers what came."""

    url: str = ""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def sequences(self) -> list[int]:
        return [json.loads(body)["sequence"] for _, body in self.received]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            status, headers = found.answers.pop(0) if found.answers else (204, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}/hook"
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Clock:
    time: datetime = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sender(cloud: Cloud, clock: Clock) -> Iterator[WebhookSender]:
    with httpx.Client(timeout=5, trust_env=False, verify=False) as http:
        yield WebhookSender(cloud.database, http, clock)


def subscribe(cloud: Cloud, clock: Clock, url: str, **wanted: Any) -> CreatedWebhook:
    return cloud.call(webhooks.create, WebhookCreate(url=url, **wanted), clock())


def happen(cloud: Cloud, clock: Clock, *types: EventType, run_id: str | None = None) -> None:
    for each in types:
        cloud.call(events.append, each, clock(), run_id=run_id, data={"number": 1})


def state(cloud: Cloud, webhook: Webhook) -> Webhook:
    return cloud.call(webhooks.get, webhook.webhook_id)


def test_events_arrive_in_order_and_signed(
    cloud: Cloud, clock: Clock, sender: WebhookSender, receiver: Receiver
) -> None:
    happen(cloud, clock, EventType.RUN_CREATED)
    webhook = subscribe(cloud, clock, receiver.url)
    happen(cloud, clock, EventType.ROUND_OPENED, EventType.JOB_QUEUED)
    assert sender.send_due() == 1
    assert sender.send_due() == 0
    # What happened before it was created is not told.
    assert receiver.sequences == [webhook.sequence + 1, webhook.sequence + 2]
    key = base64.b64decode(webhook.secret.removeprefix("whsec_"))
    for headers, body in receiver.received:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        assert headers["webhook-timestamp"] == str(int(clock().timestamp()))
        assert headers["content-type"] == "application/json"
    after = state(cloud, webhook)
    assert (after.sequence, after.failures, after.delivered_at) == (webhook.sequence + 2, 0, clock())


def test_only_what_is_wanted_is_sent(cloud: Cloud, clock: Clock, sender: WebhookSender, receiver: Receiver) -> None:
    runs = [cloud.create_run(None, strategy={"name": "standalone"}, public_data=None).run_id for _ in range(2)]
    subscribe(cloud, clock, receiver.url, types=[EventType.ROUND_OPENED], run_id=runs[0])
    for run_id in runs:
        happen(cloud, clock, EventType.ROUND_OPENED, EventType.JOB_DONE, run_id=run_id)
    assert sender.send_due() == 1
    (told,) = [json.loads(body) for _, body in receiver.received]
    assert (told["type"], told["run_id"]) == ("round.opened", runs[0])
    assert sender.send_due() == 0
    with pytest.raises(DomainError) as refused:
        subscribe(cloud, clock, receiver.url, run_id="run_nobody")
    assert refused.value.code is ErrorCode.RUN_NOT_FOUND


def test_a_failed_delivery_is_tried_again_later_and_later_and_nothing_is_skipped(
    cloud: Cloud, clock: Clock, sender: WebhookSender, receiver: Receiver
) -> None:
    webhook = subscribe(cloud, clock, receiver.url)
    happen(cloud, clock, EventType.RUN_CREATED, EventType.ROUND_OPENED)
    receiver.answers = [(200, {}), (500, {}), (302, {"Location": receiver.url}), (404, {})]
    waits = []
    for failures in (1, 2, 3):
        sender.send_due()
        failing = state(cloud, webhook)
        assert failing.failures == failures
        assert failing.last_error is not None
        assert "expected a status from 200 to 299" in failing.last_error
        assert failing.next_attempt_at is not None
        waits.append((failing.next_attempt_at - clock()).total_seconds())
        assert sender.send_due() == 0
        clock.wait(waits[-1] + 1)
    assert waits == [pytest.approx(5 * 2**number, rel=0.21) for number in range(3)]
    sender.send_due()
    first, second = webhook.sequence + 1, webhook.sequence + 2
    assert receiver.sequences == [first, second, second, second, second]
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 2
    assert state(cloud, webhook).failures == 0


def test_a_receiver_that_is_away_is_a_failure_and_holds_up_no_other(
    cloud: Cloud, clock: Clock, sender: WebhookSender, receiver: Receiver
) -> None:
    away = subscribe(cloud, clock, "http://127.0.0.1:9/hook")
    subscribe(cloud, clock, receiver.url)
    happen(cloud, clock, EventType.RUN_CREATED)
    assert sender.send_due() == 2
    assert len(receiver.received) == 1
    assert "ConnectError" in (state(cloud, away).last_error or "")


@pytest.mark.parametrize("url", ["http://a..b/hook", "http://\u2260.example/hook"])
def test_a_host_that_is_no_name_of_one_is_a_failed_attempt(
    cloud: Cloud, clock: Clock, sender: WebhookSender, url: str
) -> None:
    webhook = subscribe(cloud, clock, url)
    happen(cloud, clock, EventType.RUN_CREATED)
    assert sender.send_due() == 1
    shown = state(cloud, webhook)
    assert (shown.failures, shown.active) == (1, True)
    assert shown.last_error


def test_retry_after_is_obeyed_within_reason(
    cloud: Cloud, clock: Clock, sender: WebhookSender, receiver: Receiver
) -> None:
    webhook = subscribe(cloud, clock, receiver.url)
    happen(cloud, clock, EventType.RUN_CREATED)
    receiver.answers = [(503, {"Retry-After": "77"}), (429, {"Retry-After": "9" * 5000})]
    for seconds in (77, LONGEST_WAIT.total_seconds()):
        sender.send_due()
        next_attempt = state(cloud, webhook).next_attempt_at
        assert next_attempt == clock() + timedelta(seconds=seconds)
        clock.wait(seconds)


def test_one_that_says_gone_or_fails_for_days_is_given_up_and_can_be_resumed(
    cloud: Cloud, clock: Clock, sender: WebhookSender, receiver: Receiver
) -> None:
    webhook = subscribe(cloud, clock, receiver.url)
    happen(cloud, clock, EventType.RUN_CREATED)
    receiver.answers = [(410, {})]
    sender.send_due()
    assert not state(cloud, webhook).active
    clock.wait(1e6)
    assert sender.send_due() == 0
    cloud.call(webhooks.resume, webhook.webhook_id, clock())
    receiver.answers = [(500, {})] * 2
    sender.send_due()
    assert state(cloud, webhook).active
    clock.wait(GIVEN_UP_AFTER.total_seconds())
    sender.send_due()
    after = state(cloud, webhook)
    assert not after.active
    assert "given up after 2 attempts" in (after.last_error or "")
    cloud.call(webhooks.resume, webhook.webhook_id, clock())
    sender.send_due()
    assert state(cloud, webhook).sequence == webhook.sequence + 1
    assert len(set(receiver.sequences)) == 1


def test_two_senders_at_the_same_time_deliver_once(
    cloud: Cloud, clock: Clock, sender: WebhookSender, receiver: Receiver
) -> None:
    subscribe(cloud, clock, receiver.url)
    happen(cloud, clock, *[EventType.JOB_DONE] * 5)
    threads = [threading.Thread(target=sender.send_due) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert receiver.sequences == sorted(set(receiver.sequences))
    assert len(receiver.sequences) == 5


def test_many_events_go_in_several_claims(
    cloud: Cloud, clock: Clock, sender: WebhookSender, receiver: Receiver
) -> None:
    webhook = subscribe(cloud, clock, receiver.url)
    happen(cloud, clock, *[EventType.JOB_DONE] * (MOST_EVENTS + 3))
    while sender.send_due():
        pass
    assert receiver.sequences == [webhook.sequence + number for number in range(1, MOST_EVENTS + 4)]


def test_a_slow_receiver_gets_the_rest_with_the_next_claim(
    cloud: Cloud, clock: Clock, sender: WebhookSender, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_sender, "PATIENCE_SECONDS", 0.0)
    subscribe(cloud, clock, receiver.url)
    for _ in range(3):
        happen(cloud, clock, EventType.RUN_CREATED)
    for number in (1, 2, 3):
        assert sender.send_due() == 1
        assert len(receiver.received) == number
    assert receiver.sequences == sorted(set(receiver.sequences))
    assert sender.send_due() == 0


def test_a_deleted_one_is_told_nothing(cloud: Cloud, clock: Clock, sender: WebhookSender, receiver: Receiver) -> None:
    webhook = subscribe(cloud, clock, receiver.url)
    happen(cloud, clock, EventType.RUN_CREATED)
    cloud.call(webhooks.remove, webhook.webhook_id)
    assert sender.send_due() == 0
    assert receiver.received == []
