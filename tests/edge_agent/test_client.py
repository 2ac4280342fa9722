"""The client: how each kind of answer is understood, what is entered in the ledger, and that a stop ends every call."""

import hashlib
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from edge_agent.client import CloudClient, retry_after_seconds
from edge_agent.errors import CloudRefused, CloudUnavailable, NotAuthorised, Stopped
from edge_agent.ledger import Ledger
from protocol.assignments import Part
from protocol.devices import Heartbeat
from protocol.headers import PROTOCOL_HEADER, content_digest
from protocol.statuses import PartKind
from tests.edge_agent.conftest import make_assignment
from tests.edge_agent.fake_cloud import FakeCloud, cut, problem

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
