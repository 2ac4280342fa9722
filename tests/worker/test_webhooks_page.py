"""docs/webhooks.md: its receiver takes what the sender sends and nothing else, and its list of types is whole."""

import json
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from persistence import events, webhooks
from persistence.clock import utc_now
from persistence.webhooks import FIRST_WAIT, GIVEN_UP_AFTER, LONGEST_WAIT
from protocol.events import EventType
from protocol.webhooks import ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, WebhookCreate, signature
from tests.worker.cloud import Cloud
from worker.webhook_sender import TIMEOUT_SECONDS, WebhookSender

PAGE = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
SECRET = "whsec_c2VjcmV0IG9mIHRoaXMgd2ViaG9vaywgMzIgYnl0ZXM="
NOW = 1_772_366_400
BODY = b'{"sequence":43,"type":"run.created","run_id":"run_a","data":{}}'


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's program defines."""
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"__name__": "receiver"}
    exec(compile(program, "docs/webhooks.md", "exec"), names)
    return names


@pytest.fixture
def address(page: dict[str, Any]) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), page["Receiver"])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/cotune"
    server.shutdown()
    thread.join()
    server.server_close()


def headers(**changed: str) -> dict[str, str]:
    signed = signature(SECRET, "whk_a.43", NOW, BODY)
    return {ID_HEADER: "whk_a.43", TIMESTAMP_HEADER: str(NOW), SIGNATURE_HEADER: signed} | {
        name.replace("_", "-"): value for name, value in changed.items()
    }


def test_it_takes_what_was_signed_and_refuses_what_was_changed(page: dict[str, Any]) -> None:
    verified = page["verified"]
    assert verified(headers(), BODY, NOW) == json.loads(BODY)
    several = headers(webhook_signature=f"v1,AAAA {signature(SECRET, 'whk_a.43', NOW, BODY)}")
    assert verified(several, BODY, NOW + 299) == json.loads(BODY)
    assert verified(headers(), BODY.replace(b"43", b"44"), NOW) is None
    assert verified(headers(), BODY, NOW + 301) is None
    assert verified(headers(webhook_id="whk_a.44"), BODY, NOW) is None
    assert verified(headers(webhook_timestamp=str(NOW + 1)), BODY, NOW) is None
    assert verified(headers(webhook_timestamp="soon"), BODY, NOW) is None
    other = "whsec_b3RoZXIgc2VjcmV0IG9mIGEgd2ViaG9vaywgMzIgYg=="
    assert verified(headers(webhook_signature=signature(other, "whk_a.43", NOW, BODY)), BODY, NOW) is None
    assert verified({}, BODY, NOW) is None


def test_the_sender_delivers_to_it(
    cloud: Cloud, page: dict[str, Any], address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    now = datetime.now(UTC)
    created = cloud.call(webhooks.create, WebhookCreate(url=address), now)
    page["SECRET"] = created.secret
    cloud.call(events.append, EventType.RUN_CREATED, now, data={"name": "first"})
    with httpx.Client(timeout=5, trust_env=False) as http:
        sender = WebhookSender(cloud.database, http, utc_now)
        assert sender.send_due() == 1
        after = cloud.call(webhooks.get, created.webhook_id)
        assert (after.failures, after.sequence) == (0, created.sequence + 1)
        assert capsys.readouterr().out == "run.created None {'name': 'first'}\n"
        page["SECRET"] = SECRET
        cloud.call(events.append, EventType.RUN_CREATED, now)
        sender.send_due()
        assert cloud.call(webhooks.get, created.webhook_id).last_error == "expected a status from 200 to 299, got 401"
    assert "run.created" not in capsys.readouterr().out


def test_the_page_names_every_type_and_the_times_that_hold() -> None:
    listed = PAGE.partition("The types: ")[2].partition("\n\n")[0]
    assert re.findall(r"`([^`]+)`", listed) == [each.value for each in EventType]
    assert (TIMEOUT_SECONDS, FIRST_WAIT.total_seconds(), LONGEST_WAIT.total_seconds()) == (10, 5, 3600)
    assert GIVEN_UP_AFTER.days == 3
