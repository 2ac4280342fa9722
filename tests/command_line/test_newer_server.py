"""Every command that shows something, against a server that is newer: unknown words are shown as they came."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from command_line.exit_codes import ExitCode
from tests.command_line.conftest import Cotune
from tests.contracts.newer_server import FIELD, WORD, newer
from tests.contracts.test_messages import FOLDER, load

MESSAGES = {
    r"/v1/runs": "page_of_runs",
    r"/v1/runs/[^/]+": "run_paused",
    r"/v1/runs/[^/]+/rounds": "page_of_rounds",
    r"/v1/runs/[^/]+/rounds/\d+": "round_second_attempt",
    r"/v1/runs/[^/]+/versions": "page_of_versions",
    r"/v1/runs/[^/]+/versions/\d+": "model_version_withdrawn",
    r"/v1/runs/[^/]+/traffic": "traffic",
    r"/v1/devices": "page_of_devices",
    r"/v1/devices/[^/]+": "device",
    r"/v1/enrolment-tokens": "page_of_enrolment_tokens",
    r"/v1/federations/[^/]+": "federation",
    r"/v1/webhooks/[^/]+": "webhook",
    r"/v1/operators/keys": "page_of_operator_keys",
    r"/v1/audit": "page_of_audit_entries",
    r"/ready": "readiness",
}
"""Path -> the recorded message that is its answer, as of a newer server."""


def told(name: str) -> dict[str, Any]:
    schema, message = load(FOLDER / "messages" / f"{name}.json")
    answer: dict[str, Any] = newer(schema.model_validate(message), message)
    if "next_cursor" in answer:
        answer["next_cursor"] = None
    return answer


def with_measurements(rounds: dict[str, Any]) -> dict[str, Any]:
    """Rounds with a rejected update, and one that is in a status of tomorrow."""
    for each in rounds["items"]:
        device = each["devices"][0] | {"submitted_at": "2026-03-01T12:30:00Z", "reason": "told tomorrow"}
        each["devices"] = [device, device | {"status": "rejected", "reason": f"said so: {WORD}"}]
        each["metrics"] = {"rejected": {device["device_id"]: WORD}, "quarantined": {"dev_2": WORD}, FIELD: 1}
    return rounds


def answer_to(path: str, query: str) -> tuple[int, Any]:
    if re.fullmatch(r"/v1/runs/[^/]+/events", path):
        return 200, {"items": [] if "after=17" in query else [told("event")], "next_cursor": None}
    for pattern, name in MESSAGES.items():
        if re.fullmatch(pattern, path):
            return 200, with_measurements(told(name)) if name == "page_of_rounds" else told(name)
    return 404, told("problem") | {"detail": "what is asked for tomorrow"}


class NewerServer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        where = urlsplit(self.path)
        status, answer = answer_to(where.path, where.query)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return None


@pytest.fixture(scope="module")
def newer_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), NewerServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(newer_server: str, run_cotune: Cotune, monkeypatch: pytest.MonkeyPatch, wide: None) -> Cotune:
    monkeypatch.setenv("COTUNE_SERVER", newer_server)
    monkeypatch.setenv("COTUNE_OPERATOR_KEY", "k" * 32)
    return run_cotune


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run list", 1),
        ("run show run_1", 6),
        ("run events run_1", 1),
        ("round list run_1", 2),
        ("round show run_1 1", 5),
        ("update list run_1", 2),
        ("model list run_1", 0),
        ("model show run_1 1", 0),
        ("device list", 1),
        ("device show dev_1", 1),
        ("device tokens", 0),
        ("federation show default", 1),
        ("webhook show whk_1", 2),
        ("operator key list", 1),
        ("audit list", 0),
    ],
)
def test_a_command_shows_what_it_does_not_know(ask: Cotune, command: str, words: int) -> None:
    shown = ask(*command.split())
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.count(WORD) == words, shown.out
    printed = ask(*command.split(), "--format", "json")
    assert (printed.code, printed.err) == (0, "")
    assert FIELD not in printed.out.replace(f'"{FIELD}": 1', "")  # a round's metrics are printed as they came
    assert json.loads(printed.out)


def test_an_update_in_a_status_of_tomorrow_is_listed_and_can_be_left_out(ask: Cotune) -> None:
    listed = json.loads(ask("update", "list", "run_1", "--format", "json").out)
    assert [each["status"] for each in listed] == [WORD, "rejected"]
    listed = json.loads(ask("update", "list", "run_1", "--status", "rejected", "--format", "json").out)
    assert [each["status"] for each in listed] == ["rejected"]


def test_a_refusal_with_a_code_of_tomorrow_says_what_the_server_says(ask: Cotune) -> None:
    refused = ask("federation", "list")
    assert refused.code == ExitCode.BAD_INPUT
    assert refused.err == "error: what is asked for tomorrow\n"
    assert refused.out == ""


def test_a_run_in_a_status_of_tomorrow_is_watched_on(ask: Cotune) -> None:
    watched = ask("run", "watch", "run_1", "--timeout", "0")
    assert watched.code == ExitCode.TIMED_OUT
    assert watched.out.count(WORD) == 2, watched.out
    assert f"is still {WORD} after 0 s" in watched.err
