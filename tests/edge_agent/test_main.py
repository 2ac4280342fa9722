"""The command line: enrolment, what is checked, exit codes, and that looking loads no torch."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.__main__ import main
from edge_agent.exit_codes import ExitCode
from protocol.devices import EnrolmentRequest
from tests.edge_agent.fake_cloud import FakeCloud, cut, problem
from tests.edge_agent.test_profile import write_weights


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')
    write_weights(model / "model.safetensors", {"x": [2, 2]})
    data = tmp_path / "train.jsonl"
    data.write_text("".join(f'{{"instruction": "add", "input": "{i}", "output": "{i + 1}"}}\n' for i in range(4)))
    return {"model": model, "data": data, "home": tmp_path / "home"}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> ExitCode:
    monkeypatch.setattr(sys, "argv", ["cotune-agent", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ExitCode(ended.value.code)  # type: ignore[arg-type]


def enroll(monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud, inputs: dict[str, Path], **changes: str) -> ExitCode:
    options = {
        "server": cloud.url,
        "token": "one-time-token",
        "name": "tablet",
        "domain": "units",
        **{name: str(path) for name, path in inputs.items()},
        **changes,
    }
    return run(monkeypatch, "enroll", *(part for name, value in options.items() for part in (f"--{name}", value)))


def test_enrolment_writes_an_identity(
    monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert enroll(monkeypatch, cloud, inputs) is ExitCode.OK
    assert "dev_1" in capsys.readouterr().out
    home = inputs["home"]
    assert stat.S_IMODE((home / "credential").stat().st_mode) == 0o600
    assert (home / "credential").read_text() == "dev_1.secret\n"
    assert 'id = "dev_1"' in (home / "agent.toml").read_text()
    request = EnrolmentRequest.model_validate_json(cloud.requests("POST /v1/devices")[0].body)
    profile = request.profile
    assert (request.token, request.name, profile.domain) == ("one-time-token", "tablet", "units")
    assert (profile.model_name, profile.model_architecture, profile.model_parameters) == ("tiny", "gpt2", 4)
    assert profile.num_examples == 4

    assert run(monkeypatch, "status", "--home", home, "--format", "json") is ExitCode.OK
    facts = json.loads(capsys.readouterr().out)
    assert (facts["device_id"], facts["running"], facts["waiting_updates"]) == ("dev_1", False, 0)
    assert set(facts["bytes_sent"]) == {"enrolment"}
    assert run(monkeypatch, "status", "--home", home) is ExitCode.OK
    assert "secret" not in capsys.readouterr().out


def test_enrolling_twice_is_refused_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    enroll(monkeypatch, cloud, inputs)
    before = (inputs["home"] / "agent.toml").read_bytes()
    assert enroll(monkeypatch, cloud, inputs, name="other") is ExitCode.ALREADY_ENROLLED
    assert "enrolled already" in capsys.readouterr().err
    assert (inputs["home"] / "agent.toml").read_bytes() == before
    assert len(cloud.requests("POST /v1/devices")) == 1


def test_an_enrolment_cut_after_the_answer_is_finished_without_a_token(
    monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud, inputs: dict[str, Path]
) -> None:
    enroll(monkeypatch, cloud, inputs)
    (inputs["home"] / "agent.toml").unlink()
    assert enroll(monkeypatch, cloud, inputs) is ExitCode.OK
    assert 'id = "dev_1"' in (inputs["home"] / "agent.toml").read_text()
    assert len(cloud.requests("POST /v1/devices")) == 1


def test_everything_wrong_is_said_at_once_and_no_token_is_spent(
    monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with open(inputs["data"], "a", encoding="utf-8") as file:
        file.write('{"instruction": "add"\n')
    changes = {"token": "short", "model": "/no/such/folder", "test": "/no/such/file.jsonl"}
    assert enroll(monkeypatch, cloud, inputs, **changes) is ExitCode.BAD_CONFIGURATION
    text = capsys.readouterr().err
    for expected in ("token", "/no/such/folder", "train.jsonl", "5", "/no/such/file.jsonl"):
        assert expected in text
    assert not cloud.received
    assert not (inputs["home"] / "agent.toml").exists()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "enrolment_token_unknown", "unknown"),
        (409, "enrolment_token_used", "used"),
        (410, "enrolment_token_expired", "exp"),
    ],
)
def test_a_refused_token_is_clear(
    monkeypatch: pytest.MonkeyPatch,
    cloud: FakeCloud,
    inputs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    status: int,
    code: str,
    words: str,
) -> None:
    cloud.fail("devices", problem(status, code, f"the token is {words}"))
    assert enroll(monkeypatch, cloud, inputs) is ExitCode.CONNECTION_OR_AUTHORISATION
    assert f"the token is {words}" in capsys.readouterr().err
    assert enroll(monkeypatch, cloud, inputs) is ExitCode.OK


def test_a_server_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.fail("devices", cut)
    assert enroll(monkeypatch, cloud, inputs) is ExitCode.CONNECTION_OR_AUTHORISATION
    assert cloud.url in capsys.readouterr().err


def test_https_to_a_server_that_speaks_http_says_so(
    monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    address = cloud.url.replace("http:", "https:")
    assert enroll(monkeypatch, cloud, inputs, server=address) is ExitCode.CONNECTION_OR_AUTHORISATION
    assert "it speaks http, not https" in capsys.readouterr().err


def test_a_wrong_option_is_bad_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "enroll", "--home", tmp_path) is ExitCode.BAD_CONFIGURATION
    assert run(monkeypatch, "start", "--home", tmp_path, "--colour", "red") is ExitCode.BAD_CONFIGURATION
    assert "--colour" in capsys.readouterr().err
    assert run(monkeypatch, "--help") is ExitCode.OK


def test_an_unwritable_home_is_named(
    monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    inputs["home"] = inputs["data"] / "home"  # below a file
    assert enroll(monkeypatch, cloud, inputs) is ExitCode.BAD_CONFIGURATION
    assert "can be written" in capsys.readouterr().err


def test_start_checks_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, cloud: FakeCloud, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "start", "--home", inputs["home"]) is ExitCode.BAD_CONFIGURATION
    assert "not enrolled" in capsys.readouterr().err
    enroll(monkeypatch, cloud, inputs)
    inputs["data"].write_text("")
    assert run(monkeypatch, "start", "--home", inputs["home"]) is ExitCode.BAD_CONFIGURATION
    assert "train.jsonl" in capsys.readouterr().err


def test_enrolment_and_status_load_no_torch(cloud: FakeCloud, inputs: dict[str, Path]) -> None:
    code = (
        "import sys\nfrom edge_agent.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n"
        "    loaded = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "    sys.exit(f'loaded {loaded}' if loaded else ended.code)\n"
    )
    options = [f"--{name}={value}" for name, value in inputs.items()]
    environment = os.environ | {"COTUNE_SERVER": cloud.url, "COTUNE_TOKEN": "one-time-token"}
    for arguments in (["enroll", "--name=tablet", *options], ["status", f"--home={inputs['home']}"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
