"""The commands against a real API: what they print, and the code they end in."""

import json
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import typer

from command_line.api_client import ApiClient
from command_line.errors import NotAuthorised
from command_line.exit_codes import ExitCode
from command_line.ports import free_port
from edge_agent.__main__ import app as agent
from persistence import jobs, results, runs
from persistence.database import Database
from protocol.devices import EnrolmentTokenCreate
from protocol.errors import ErrorCode
from tests.cloud_api.running_api import PROFILE
from tests.command_line.conftest import Cotune, RunningApi

RUN = """
name = "{name}"
rounds = 2
llm = "{folder}/llm"
public_data = "{folder}/public.jsonl"

[strategy]
name = "co_plms"
"""


def run_text(tmp_path: Path, name: str) -> str:
    """A run's TOML; what it names is there, as far as the API looks."""
    (tmp_path / "llm").mkdir(exist_ok=True)
    (tmp_path / "llm" / "config.json").write_text("{}")
    (tmp_path / "public.jsonl").write_text("")
    return RUN.format(name=name, folder=tmp_path)


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def create(connected: Cotune, tmp_path: Path, name: str) -> str:
    ended = connected("run", "create", toml(tmp_path, run_text(tmp_path, name)), "--format", "json")
    assert (ended.code, ended.err) == (0, "")
    return str(json.loads(ended.out)["run_id"])


def test_a_token_is_shown_with_the_command_for_the_device(connected: Cotune, api: RunningApi) -> None:
    ended = connected("device", "token", "--uses", "2", "--note", "two laptops")
    assert ended.code == ExitCode.OK
    shown = set(re.findall(r"--\w+", ended.out.partition("cotune-agent enroll")[2]))
    enroll = typer.main.get_command(agent).commands["enroll"]  # type: ignore[attr-defined]
    assert shown == {each.opts[0] for each in enroll.params if each.required}
    assert api.address in ended.out
    as_json = json.loads(connected("device", "token", "--format", "json").out)
    assert as_json["uses"] == 1
    assert as_json["token"] not in ended.out


def test_no_device_is_an_empty_list(connected: Cotune) -> None:
    assert json.loads(connected("device", "list", "--status", "offline", "--format", "json").out) == []
    assert "0 device(s)" in connected("device", "list", "--status", "offline").out


def test_a_token_is_listed_and_revoked(connected: Cotune) -> None:
    made = json.loads(connected("device", "token", "--approval", "--note", "lab", "--format", "json").out)
    listed = connected("device", "tokens")
    assert made["token_id"] in listed.out
    assert made["token"] not in listed.out
    assert "is revoked" in connected("device", "revoke-token", made["token_id"]).out
    states = {each["token_id"]: each for each in json.loads(connected("device", "tokens", "--format", "json").out)}
    assert states[made["token_id"]]["revoked_at"]
    assert states[made["token_id"]]["approval"] is True
    assert connected("device", "revoke-token", "tok_0").code == ExitCode.BAD_INPUT


def test_a_device_is_approved_and_revoked(connected: Cotune, api: RunningApi) -> None:
    token = json.loads(connected("device", "token", "--approval", "--format", "json").out)["token"]
    body = {"token": token, "name": "pi", "profile": PROFILE}
    device_id = httpx.post(f"{api.address}/v1/devices", json=body, trust_env=False).json()["device_id"]
    assert "pending" in connected("device", "list").out
    assert f"{device_id} (pi) is registered" in connected("device", "approve", device_id).out
    revoked = connected("device", "revoke", device_id, "--format", "json")
    assert json.loads(revoked.out)["status"] == "revoked"
    ended = connected("device", "approve", device_id)
    assert ended.code == ExitCode.BAD_INPUT
    assert "revoked" in ended.err


def test_an_operators_key_works_until_it_is_revoked(connected: Cotune, api: RunningApi) -> None:
    made = json.loads(connected("operator", "key", "create", "--name", "ada", "--format", "json").out)
    assert made["role"] == "viewer"
    assert "shown this once" in connected("operator", "key", "create", "--name", "grace", "--role", "operator").out
    listed = connected("operator", "key", "list")
    assert made["key_id"] in listed.out
    assert made["key"] not in listed.out
    with ApiClient(api.address, made["key"]) as client:
        assert client.list_devices() is not None
        with pytest.raises(NotAuthorised, match="role operator"):
            client.create_token(EnrolmentTokenCreate())
        assert connected("operator", "key", "revoke", made["key_id"]).code == ExitCode.OK
        with pytest.raises(NotAuthorised, match="was revoked"):
            client.list_devices()


def test_a_run_is_created_listed_shown_and_stopped(connected: Cotune, tmp_path: Path) -> None:
    run_id = create(connected, tmp_path, "first")
    listed = json.loads(connected("run", "list", "--format", "json").out)
    assert run_id in [each["run_id"] for each in listed]
    assert "first" in connected("run", "list").out
    assert "pending" in connected("run", "show", run_id).out
    stopped = connected("run", "stop", run_id, "--reason", "wrong data")
    assert stopped.code == ExitCode.OK
    assert "stopped" in stopped.out
    assert "wrong data" in stopped.out
    assert json.loads(connected("run", "show", run_id, "--format", "json").out)["status"] == "stopped"


def test_a_run_is_held_failed_retried_and_rolled_back(connected: Cotune, api: RunningApi, tmp_path: Path) -> None:
    run_id = create(connected, tmp_path, "moved")
    refused = connected("run", "pause", run_id)
    assert refused.code == ExitCode.BAD_INPUT
    assert "pending" in refused.err
    database = Database(f"sqlite:///{api.home / 'cotune.sqlite3'}")
    with database.transaction() as session:
        job_id = jobs.due_for_sending(session, datetime.now(UTC), 0)[-1].job_id
        job = jobs.claim(session, job_id, "worker", 60, datetime.now(UTC))
        assert job is not None
        assert job.run_id == run_id
        results.finish_prepare(session, job, "worker", results.PrepareResult(), datetime.now(UTC))
    paused = connected("run", "pause", run_id, "--reason", "the worker is needed")
    assert "why: the worker is needed" in paused.out
    assert "waits for: operator, by an operator, since" in paused.out
    assert "waits for: devices, since" in connected("run", "resume", run_id).out
    assert "version 7" in connected("run", "rollback", run_id, "7").err
    back = connected("run", "rollback", run_id, "0", "--reason", "worse", "--format", "json")
    assert json.loads(back.out)["latest_version"] == 0
    assert "only a failed run can be retried" in connected("run", "retry", run_id).err
    with database.transaction() as session:
        runs.fail_run(session, run_id, ErrorCode.JOB_FAILED, "no memory", datetime.now(UTC))
    assert "running, round 1 of 2" in connected("run", "retry", run_id).out
    database.dispose()
    connected("run", "stop", run_id)


def test_watching_a_stopped_run_ends_in_1(connected: Cotune, tmp_path: Path) -> None:
    run_id = create(connected, tmp_path, "ended")
    connected("run", "stop", run_id)
    ended = connected("run", "watch", run_id)
    assert ended.code == ExitCode.RUN_FAILED
    assert f"run {run_id} stopped" in ended.err


def test_watching_a_run_that_waits_ends_in_3(connected: Cotune, tmp_path: Path) -> None:
    run_id = create(connected, tmp_path, "waiting")
    ended = connected("run", "watch", run_id, "--timeout", "0")
    assert ended.code == ExitCode.TIMED_OUT
    assert "it goes on" in ended.err
    connected("run", "stop", run_id)


def test_stopping_twice_is_stopping_once(connected: Cotune, tmp_path: Path) -> None:
    run_id = create(connected, tmp_path, "twice")
    connected("run", "stop", run_id, "--reason", "first")
    ended = connected("run", "stop", run_id, "--reason", "second")
    assert ended.code == ExitCode.OK
    assert "first" in ended.out


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ('name = "co_plms"', "strategy", "standalone"),
        ("rounds = 2", "rounds", "greater than or equal to 1"),
        ("public_data", "public", "public"),
    ],
)
def test_a_wrong_run_is_refused_with_the_field(
    connected: Cotune, tmp_path: Path, change: str, field: str, said: str
) -> None:
    wrong = {"strategy": 'name = "co_plm"', "rounds": "rounds = 0", "public": "public"}[field]
    ended = connected("run", "create", toml(tmp_path, run_text(tmp_path, "wrong").replace(change, wrong)))
    assert ended.code == ExitCode.BAD_INPUT
    assert field in ended.err
    assert said in ended.err


def test_every_wrong_field_is_said_once(connected: Cotune, tmp_path: Path) -> None:
    text = run_text(tmp_path, "wrong").replace("rounds = ", "rouns = ")
    ended = connected("run", "create", toml(tmp_path, text))
    assert ended.code == ExitCode.BAD_INPUT
    assert "2 wrong field(s)" in ended.err
    for field in ("rounds: expected a value, got none", "rouns: there is no such field"):
        assert ended.err.count(field) == 1


def test_a_missing_model_folder_is_named(connected: Cotune, tmp_path: Path) -> None:
    text = run_text(tmp_path, "wrong").replace(f"{tmp_path}/llm", "/no/such/llm")
    ended = connected("run", "create", toml(tmp_path, text))
    assert ended.code == ExitCode.BAD_INPUT
    assert "/no/such/llm" in ended.err


def test_a_file_that_is_not_toml_is_named_with_the_line(connected: Cotune, tmp_path: Path) -> None:
    ended = connected("run", "create", toml(tmp_path, 'name = "x"\nrounds = \n'))
    assert ended.code == ExitCode.BAD_INPUT
    assert "run.toml" in ended.err
    assert "line 2" in ended.err
    ended = connected("run", "create", str(tmp_path / "nothing.toml"))
    assert "No such file" in ended.err


def test_an_unknown_run(connected: Cotune) -> None:
    ended = connected("run", "show", "no-such-run")
    assert ended.code == ExitCode.BAD_INPUT
    assert "no-such-run" in ended.err


def test_no_server_ends_in_2(connected: Cotune, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = connected("run", "list", "--server", f"http://127.0.0.1:{free_port()}")
    assert ended.code == ExitCode.CONNECTION_OR_AUTHORISATION
    assert "cannot reach the API" in ended.err
    assert "cotune up" in ended.err


def test_a_wrong_key_ends_in_2(connected: Cotune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_OPERATOR_KEY", "not-the-key")
    ended = connected("run", "list")
    assert ended.code == ExitCode.CONNECTION_OR_AUTHORISATION
    assert "COTUNE_OPERATOR_KEY" in ended.err
    assert "got something that this server does not know" in ended.err


def test_no_key_ends_in_2(run_cotune: Cotune, api: RunningApi) -> None:
    ended = run_cotune("run", "list", "--server", api.address)
    assert ended.code == ExitCode.CONNECTION_OR_AUTHORISATION
    assert "operator.key" in ended.err


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://cloud", "http://"])
def test_a_wrong_address(connected: Cotune, address: str) -> None:
    ended = connected("run", "list", "--server", address)
    assert ended.code == ExitCode.BAD_INPUT
    assert "http://127.0.0.1:8000" in ended.err


def test_a_server_that_is_not_ours(connected: Cotune, not_ours: str) -> None:
    ended = connected("run", "list", "--server", not_ours)
    assert ended.code == ExitCode.CONNECTION_OR_AUTHORISATION
    assert "expected a Cotune API" in ended.err


def test_help_is_for_newcomers(run_cotune: Cotune) -> None:
    ended = run_cotune("--help")
    assert ended.code == 0
    for word in ("demo", "up", "run", "device", "operator", "New here?"):
        assert word in ended.out
    for command in (["demo"], ["up"], ["run", "create"], ["run", "watch"], ["device", "token"]):
        assert run_cotune(*command, "--help").code == 0


@pytest.mark.parametrize("arguments", [["nonsense"], ["run", "show"], ["demo", "--rounds", "0"]])
def test_a_wrong_command_line_does_not_look_like_a_lost_connection(run_cotune: Cotune, arguments: list[str]) -> None:
    assert run_cotune(*arguments).code == ExitCode.BAD_INPUT


def test_a_demo_that_cannot_start_leaves_no_folder(
    run_cotune: Cotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    ended = run_cotune("demo", "--data", str(tmp_path / "none"), "--domains", "a", "--out", str(tmp_path / "demo.json"))
    assert ended.code == ExitCode.BAD_INPUT
    assert f"expected a data folder, got {tmp_path / 'none'}" in ended.err
    assert "the logs are in" not in ended.err
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_version(run_cotune: Cotune) -> None:
    from importlib.metadata import version

    assert run_cotune("--version").out.strip() == version("cotune")
