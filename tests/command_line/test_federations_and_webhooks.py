"""Federations, webhooks, devices and the audit trail at the command line, against a real API."""

import json
import re

import httpx
import pytest

from command_line.exit_codes import ExitCode
from tests.cloud_api.running_api import PROFILE
from tests.command_line.conftest import Cotune, RunningApi

pytestmark = pytest.mark.usefixtures("wide")


def enrol(connected: Cotune, api: RunningApi, name: str, *options: str) -> str:
    """Let a device in with a token of these options; return its id."""
    token = json.loads(connected("device", "token", *options, "--format", "json").out)["token"]
    body = {"token": token, "name": name, "profile": PROFILE}
    return str(httpx.post(f"{api.address}/v1/devices", json=body, trust_env=False).json()["device_id"])


def test_a_federation_is_made_shown_changed_and_deleted(connected: Cotune) -> None:
    made = connected("federation", "create", "north", "--description", "four hospitals")
    assert made.code == ExitCode.OK
    assert re.search(r"^Description: +four hospitals$", made.out, re.MULTILINE)
    names = [each["name"] for each in json.loads(connected("federation", "list", "--format", "json").out)]
    assert {"default", "north"} <= set(names)
    assert f"{len(names)} federation(s)" in connected("federation", "list").out
    taken = connected("federation", "create", "north")
    assert taken.code == ExitCode.BAD_INPUT
    assert "north" in taken.err
    changed = connected("federation", "change", "north", "--description", "five hospitals", "--format", "json")
    assert json.loads(changed.out)["description"] == "five hospitals"
    shown = json.loads(connected("federation", "show", "north", "--format", "json").out)
    assert (shown["num_devices"], shown["num_runs"]) == (0, 0)
    assert "north is deleted." in connected("federation", "delete", "north").out
    gone = connected("federation", "show", "north")
    assert gone.code == ExitCode.BAD_INPUT
    assert "cotune federation list" in gone.err
    assert connected("federation", "delete", "default").code == ExitCode.BAD_INPUT


def test_a_name_that_no_federation_can_have_is_refused_before_it_is_sent(run_cotune: Cotune) -> None:
    ended = run_cotune("federation", "create", "North Side")
    assert ended.code == ExitCode.BAD_INPUT
    assert "name: String should match pattern" in ended.err
    assert "got 'North Side'" in ended.err


def test_devices_are_added_to_federations_and_removed(connected: Cotune, api: RunningApi) -> None:
    for name in ("east", "west"):
        connected("federation", "create", name)
    device_id = enrol(connected, api, "pi", "--federation", "east", "--federation", "west")
    shown = connected("device", "show", device_id)
    assert re.search(r"^Federations: +east, west$", shown.out, re.MULTILINE)
    assert re.search(r"^Signs: +no$", shown.out, re.MULTILINE)
    removed = connected("federation", "remove-device", "west", device_id, "--format", "json")
    assert json.loads(removed.out)["num_devices"] == 0
    assert json.loads(connected("device", "show", device_id, "--format", "json").out)["federations"] == ["east"]
    assert re.search(r"^Devices: +1$", connected("federation", "add-device", "west", device_id).out, re.MULTILINE)
    listed = json.loads(connected("device", "list", "--federation", "west", "--format", "json").out)
    assert [each["device_id"] for each in listed] == [device_id]
    west = connected("federation", "show", "west").out
    assert device_id in west
    assert "1 device(s)" in west
    assert "0 device(s)" in connected("device", "list", "--federation", "west", "--status", "pending").out
    assert json.loads(connected("federation", "delete", "west", "--format", "json").out) == {"deleted": "west"}
    connected("device", "revoke", device_id)


def test_a_token_for_a_federation_that_is_not_there(connected: Cotune) -> None:
    ended = connected("device", "token", "--federation", "nowhere")
    assert ended.code == ExitCode.BAD_INPUT
    assert "nowhere" in ended.err
    assert "cotune federation list" in ended.err


def test_a_webhook_is_made_shown_resumed_and_deleted(connected: Cotune) -> None:
    address = "https://ops.example/hook"
    made = connected(
        "webhook", "create", address, "--type", "run.status_changed", "--note", "pager", "--format", "json"
    )
    webhook = json.loads(made.out)
    assert webhook["secret"].startswith("whsec_")
    assert webhook["types"] == ["run.status_changed"]
    shown = connected("webhook", "show", webhook["webhook_id"])
    for word in (address, "run.status_changed", "pager"):
        assert word in shown.out
    assert webhook["secret"] not in shown.out
    listed = connected("webhook", "list")
    assert webhook["webhook_id"] in listed.out
    assert address in listed.out
    assert json.loads(connected("webhook", "list", "--format", "json").out)[-1]["note"] == "pager"
    resumed = json.loads(connected("webhook", "resume", webhook["webhook_id"], "--format", "json").out)
    assert resumed["active"] is True
    assert f"({address}) is deleted." in connected("webhook", "delete", webhook["webhook_id"]).out
    gone = connected("webhook", "show", webhook["webhook_id"])
    assert gone.code == ExitCode.BAD_INPUT
    assert "cotune webhook list" in gone.err


def test_a_webhooks_secret_is_shown_once_to_a_person_too(connected: Cotune) -> None:
    made = connected("webhook", "create", "https://ops.example/all")
    assert re.search(r"^Secret, shown this once: whsec_\S+$", made.out, re.MULTILINE)
    assert re.search(r"^Types: +all$", made.out, re.MULTILINE)
    webhook_id = re.search(r"^Webhook: +(\S+)$", made.out, re.MULTILINE)
    assert webhook_id is not None
    assert connected("webhook", "delete", webhook_id[1]).code == ExitCode.OK


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ftp://ops.example",), "got 'ftp://ops.example'"),
        (("https://ops.example", "--type", "no.such"), "run.status_changed"),
        (("https://ops.example", "--run", "run_0"), "cotune run list"),
    ],
)
def test_a_wrong_webhook(connected: Cotune, arguments: tuple[str, ...], said: str) -> None:
    ended = connected("webhook", "create", *arguments)
    assert ended.code == ExitCode.BAD_INPUT
    assert said in ended.err


def test_what_was_done_is_in_the_trail(connected: Cotune) -> None:
    made = json.loads(connected("operator", "key", "create", "--name", "linus", "--format", "json").out)
    assert "is revoked" in connected("operator", "key", "revoke", made["key_id"]).out
    trail = connected("audit", "list", "--subject", made["key_id"], "--format", "json")
    assert [entry["action"] for entry in json.loads(trail.out)] == ["operator_key.revoke", "operator_key.create"]
    filters = ("--subject", made["key_id"], "--action", "operator_key.create", "--key", "bootstrap")
    assert "1 entries" in connected("audit", "list", *filters).out
    assert "operator_key.revoke" in connected("audit", "list", "--limit", "1").out
    assert json.loads(connected("audit", "list", "--key", "key_0", "--format", "json").out) == []


def test_a_list_longer_than_a_page_is_read_to_its_end_or_to_the_limit(
    connected: Cotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        connected("federation", "change", "default", "--description", str(number))
    monkeypatch.setattr("command_line.transport.LARGEST_PAGE", 2)
    filters = ("--subject", "default", "--action", "federation.change", "--format", "json")
    for limit, expected in (("1000", 5), ("5", 5), ("4", 4), ("3", 3), ("1", 1)):
        sequences = [
            each["sequence"] for each in json.loads(connected("audit", "list", *filters, "--limit", limit).out)
        ]
        assert len(sequences) == expected
        assert sequences == sorted(set(sequences), reverse=True)


def test_a_role_that_is_too_small_ends_in_2_and_says_what_to_do(
    connected: Cotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = json.loads(connected("operator", "key", "create", "--name", "eve", "--format", "json").out)
    monkeypatch.setenv("COTUNE_OPERATOR_KEY", made["key"])
    assert connected("federation", "list").code == ExitCode.OK
    for arguments in (
        ("federation", "create", "mine"),
        ("webhook", "list"),
        ("webhook", "create", "https://ops.example"),
        ("audit", "list"),
        ("device", "token"),
        ("run", "stop", "run_0"),
    ):
        ended = connected(*arguments)
        assert ended.code == ExitCode.CONNECTION_OR_AUTHORISATION, arguments
        assert "role" in ended.err
        assert "cotune operator key create" in ended.err
