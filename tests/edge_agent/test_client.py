"""The client: how each kind of answer is understood, what is entered in the ledger, and that a stop ends every call."""

import contextlib
import gzip
import hashlib
import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path

import pytest

from edge_agent.client import LARGEST_ANSWER_BYTES, CloudClient, retry_after_seconds
from edge_agent.errors import CloudRefused, CloudUnavailable, NotAuthorised, Stopped
from edge_agent.ledger import Ledger
from protocol.assignments import Part
from protocol.devices import Heartbeat
from protocol.headers import PROTOCOL_HEADER, content_digest
from protocol.statuses import PartKind
from tests.edge_agent.conftest import make_assignment
from tests.edge_agent.fake_cloud import FakeCloud, Handler, cut, problem

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def test_requests_carry_the_credential_and_the_protocol(client: CloudClient, cloud: FakeCloud) -> None:
    client.heartbeat(Heartbeat())
    (request,) = cloud.requests("heartbeat")
    assert request.headers["authorization"] == "Bearer dev_1.secret"
    assert request.headers[PROTOCOL_HEADER.lower()] == "1"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "unauthenticated", NotAuthorised),
        (403, "device_revoked", NotAuthorised),
        (403, "device_not_approved", CloudUnavailable),
        (422, "digest_mismatch", CloudUnavailable),
        (404, "assignment_not_found", CloudRefused),
        (409, "round_closed", CloudRefused),
        (422, "a_code_of_the_future", CloudRefused),
        (429, "unavailable", CloudUnavailable),
        (500, "internal_error", CloudUnavailable),
        (503, "unavailable", CloudUnavailable),
    ],
)
def test_every_problem_has_its_place(
    client: CloudClient, cloud: FakeCloud, status: int, code: str, expected: type[Exception]
) -> None:
    cloud.fail("heartbeat", problem(status, code, "the detail"))
    with pytest.raises(expected, match="the detail") as caught:
        client.heartbeat(Heartbeat())
    assert type(caught.value) is expected


@pytest.mark.parametrize("status", [200, 301, 404, 502])
def test_somebody_elses_page_means_try_again(client: CloudClient, cloud: FakeCloud, status: int) -> None:
    """A captive portal or a proxy may answer anything; it must not make the device drop its work."""
    cloud.fail("heartbeat", lambda handler: handler.send_json(status, ["not", "ours"]))
    with pytest.raises(CloudUnavailable, match=r"expected a HeartbeatReceipt|not an answer of a Cotune server"):
        client.heartbeat(Heartbeat())


@pytest.mark.parametrize("status", [200, 409])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_an_answer_without_end_is_not_read_to_its_end(
    client: CloudClient, cloud: FakeCloud, status: int, packed: bool
) -> None:
    body = b'{"detail": "' + b"x" * LARGEST_ANSWER_BYTES + b'"}'
    cloud.fail("heartbeat", partial(send_bytes, status=status, body=gzip.compress(body, 1) if packed else body))
    with pytest.raises(CloudUnavailable, match=f"more than {LARGEST_ANSWER_BYTES} bytes"):
        client.heartbeat(Heartbeat())


@pytest.mark.parametrize("status", [200, 409])
def test_a_nest_of_brackets_is_somebody_elses_page(client: CloudClient, cloud: FakeCloud, status: int) -> None:
    cloud.fail("heartbeat", partial(send_bytes, status=status, body=b"[" * 1_000_000))
    with pytest.raises(CloudUnavailable):
        client.heartbeat(Heartbeat())


def test_a_packed_answer_is_unpacked(client: CloudClient, cloud: FakeCloud) -> None:
    body = json.dumps({"server_time": NOW.isoformat(), "next_within_seconds": 30}).encode()
    cloud.fail("heartbeat", partial(send_bytes, status=200, body=gzip.compress(body)))
    assert client.heartbeat(Heartbeat()).next_within_seconds == 30


def send_bytes(handler: Handler, status: int, body: bytes) -> None:
    handler.send_response(status)
    if body.startswith(b"\x1f\x8b"):
        handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    with contextlib.suppress(ConnectionError):  # the client hangs up
        handler.wfile.write(body)


def test_no_answer_and_nobody_there_mean_try_again(client: CloudClient, cloud: FakeCloud, ledger: Ledger) -> None:
    cloud.fail("heartbeat", cut)
    with pytest.raises(CloudUnavailable, match=cloud.url):
        client.heartbeat(Heartbeat())
    with (
        CloudClient("http://127.0.0.1:9", "a.b", ledger, threading.Event(), now=lambda: NOW) as nobody,
        pytest.raises(CloudUnavailable, match="refused"),
    ):
        nobody.heartbeat(Heartbeat())


def test_retry_after_is_read_in_both_forms() -> None:
    assert retry_after_seconds("12", NOW) == 12
    assert retry_after_seconds(format_datetime(NOW + timedelta(seconds=30), usegmt=True), NOW) == 30
    assert retry_after_seconds(format_datetime(NOW - timedelta(seconds=30), usegmt=True), NOW) == 0
    assert retry_after_seconds("999999999", NOW) == 3600
    assert retry_after_seconds("soon", NOW) is None
    assert retry_after_seconds(None, NOW) is None


def test_retry_after_reaches_the_caller(client: CloudClient, cloud: FakeCloud) -> None:
    cloud.fail("heartbeat", problem(503, "unavailable", Retry_After="5"))
    with pytest.raises(CloudUnavailable) as caught:
        client.heartbeat(Heartbeat())
    assert caught.value.retry_after_seconds == 5


def test_an_upload_announces_its_digest_and_length_and_is_in_the_ledger_first(
    client: CloudClient, cloud: FakeCloud, ledger: Ledger, tmp_path: Path
) -> None:
    assignment = make_assignment(cloud)
    file = tmp_path / "part"
    file.write_bytes(b"x" * 600_000)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    part = Part(kind=PartKind.LOGITS, sha256=sha256, size_bytes=600_000)
    cloud.fail("PUT", cut)
    with pytest.raises(CloudUnavailable):
        client.upload_part(assignment, part, file)
    assert client.upload_part(assignment, part, file).sha256 == sha256
    request = cloud.requests("PUT")[-1]
    assert request.headers["content-length"] == "600000"
    assert request.headers["content-digest"] == content_digest(sha256)
    # Both attempts are listed: of the first one, too, bytes have left.
    assert [(one.kind, one.size_bytes, one.sha256, one.round_number) for one in ledger.entries()] == [
        ("logits", 600_000, sha256, 1)
    ] * 2


def test_a_stop_ends_a_call_that_hangs(client: CloudClient, cloud: FakeCloud, stop: threading.Event) -> None:
    cloud.fail("assignment", lambda handler: time.sleep(3))
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        client.next_assignment(20)
    assert time.monotonic() - started < 1
