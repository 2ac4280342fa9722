"""Rounds, updates, versions and events of a run that was played, against a real API."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line.exit_codes import ExitCode
from tests.command_line.conftest import Cotune, RunningApi, served
from tests.command_line.played_run import LLM_ADAPTER, Played, play

pytestmark = pytest.mark.usefixtures("wide")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    with served(tmp_path_factory.mktemp("played")) as running:
        yield running


@pytest.fixture(scope="module")
def played(api: RunningApi) -> Played:
    return play(api)


def test_rounds_are_listed_and_shown(connected: Cotune, played: Played) -> None:
    listed = connected("round", "list", played.run_id)
    assert "1 round(s)" in listed.out
    for word in ("published", "1 counted", "1 quarantined", "1 rejected", "1 late", "version 1 is promoted"):
        assert word in listed.out, word
    [as_json] = json.loads(connected("round", "list", played.run_id, "--format", "json").out)
    assert (as_json["number"], as_json["status"], len(as_json["devices"])) == (1, "published", 4)
    shown = connected("round", "show", played.run_id, "1", "--attempt", "1")
    for word in (as_json["round_id"], "quarantined", "norm_outlier: 98.25 is far from 1.5"):
        assert word in shown.out, word
    assert json.loads(connected("round", "show", played.run_id, "1", "--format", "json").out) == as_json


def test_a_round_that_is_not_there(connected: Cotune, played: Played) -> None:
    for arguments in (("2",), ("1", "--attempt", "2")):
        ended = connected("round", "show", played.run_id, *arguments)
        assert ended.code == ExitCode.BAD_INPUT
        assert "cotune round list" in ended.err


def test_updates_are_listed_with_what_became_of_them_and_why(connected: Cotune, played: Played) -> None:
    listed = connected("update", "list", played.run_id)
    assert "4 update(s)" in listed.out
    as_json = json.loads(connected("update", "list", played.run_id, "--format", "json").out)
    assert {each["status"]: each["device_id"] for each in as_json} == played.devices
    by_status = {each["status"]: each for each in as_json}
    assert by_status["quarantined"]["reason"] == "norm_outlier: 98.25 is far from 1.5"
    assert by_status["quarantined"]["norm"] == 98.25
    assert by_status["rejected"]["reason"] == "non_finite_values: nan in a.lora_A.weight"
    assert by_status["late"]["late"] is True
    assert all(each["round_number"] == 1 and each["num_examples"] == 10 for each in as_json)
    quarantined = connected("update", "list", played.run_id, "--status", "quarantined", "--round", "1").out
    assert "1 update(s)" in quarantined
    assert "98.250" in quarantined
    assert "rejected" not in quarantined
    assert "round 1" in connected("update", "list", played.run_id, "--status", "counted").out
    assert json.loads(connected("update", "list", played.run_id, "--round", "2", "--format", "json").out) == []


def test_a_status_without_an_update_is_refused(connected: Cotune, played: Played) -> None:
    ended = connected("update", "list", played.run_id, "--status", "training")
    assert ended.code == ExitCode.BAD_INPUT
    assert "quarantined" in ended.err


def test_versions_are_listed_and_shown_with_their_lineage(connected: Cotune, played: Played) -> None:
    listed = connected("model", "list", played.run_id)
    assert "2 version(s)" in listed.out
    assert "llm: EM 42.0, Rouge-L 71.5, 0.750 bits/byte" in listed.out
    as_json = json.loads(connected("model", "list", played.run_id, "--format", "json").out)
    assert [(each["number"], each["promoted"], each["num_updates"]) for each in as_json] == [(0, True, 0), (1, True, 1)]
    newest = connected("model", "show", played.run_id)
    for word in ("promoted", as_json[1]["llm_adapter_sha256"], "Lineage"):
        assert word in newest.out
    shown = json.loads(connected("model", "show", played.run_id, "1", "--format", "json").out)
    assert [each["number"] for each in shown["lineage"]] == [1, 0]


def test_a_model_card_is_printed(connected: Cotune, played: Played) -> None:
    card = connected("model", "card", played.run_id, "1")
    assert card.out.count("# played, version 1") == 1
    as_json = json.loads(connected("model", "card", played.run_id, "--format", "json").out)
    assert as_json == {"run_id": played.run_id, "version": 1, "markdown": card.out}


def test_an_adapter_is_pulled_as_a_folder(
    connected: Cotune, played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pulled = connected("model", "pull", played.run_id)
    assert pulled.code == ExitCode.OK, pulled.err
    folder = tmp_path / f"{played.run_id}-v1-llm"
    assert sorted(each.name for each in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert (folder / "adapter_model.safetensors").read_bytes() == LLM_ADAPTER
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "hub/llm"
    assert folder.name in pulled.out
    again = connected("model", "pull", played.run_id)
    assert again.code == ExitCode.BAD_INPUT
    assert "--to" in again.err
    target = tmp_path / "deep" / "proxy"
    as_json = json.loads(
        connected(
            "model", "pull", played.run_id, "1", "--adapter", "proxy", "--to", str(target), "--format", "json"
        ).out
    )
    assert as_json["folder"] == str(target)
    assert as_json["files"] == {each.name: each.stat().st_size for each in target.iterdir()}
    assert sorted(each.name for each in tmp_path.iterdir() if each.name.startswith(".")) == []


def test_an_adapter_that_cannot_be_pulled_leaves_nothing(connected: Cotune, played: Played, tmp_path: Path) -> None:
    ended = connected("model", "pull", played.run_id, "9", "--to", str(tmp_path / "nine"))
    assert ended.code == ExitCode.BAD_INPUT
    assert "version 9" in ended.err
    assert "cotune model list" in ended.err
    (tmp_path / "file").write_text("")
    ended = connected("model", "pull", played.run_id, "--to", str(tmp_path / "file" / "folder"))
    assert ended.code == ExitCode.BAD_INPUT
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"]


def test_a_run_without_a_version(connected: Cotune, played: Played, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('name = "new"\nrounds = 1\nllm = "a/b"\npublic_data = "c/d"\n[strategy]\nname = "co_plms"\n')
    run_id = json.loads(connected("run", "create", str(file), "--format", "json").out)["run_id"]
    for verb in ("show", "card", "pull"):
        ended = connected("model", verb, run_id)
        assert ended.code == ExitCode.BAD_INPUT
        assert "no promoted version yet" in ended.err
        assert f"cotune run watch {run_id}" in ended.err
    ended = connected("run", "events", run_id, "--follow", "--timeout", "0")
    assert ended.code == ExitCode.TIMED_OUT
    assert "run.created" in ended.out
    filtered = json.loads(connected("run", "list", "--status", "pending", "--format", "json").out)
    assert [each["run_id"] for each in filtered] == [run_id]
    assert json.loads(connected("run", "list", "--federation", "other", "--format", "json").out) == []


def test_events_are_listed_and_followed_to_the_end(connected: Cotune, played: Played) -> None:
    as_json = json.loads(connected("run", "events", played.run_id, "--format", "json").out)
    types = [each["type"] for each in as_json]
    assert types[0] == "run.created"
    assert {"update.quarantined", "update.rejected", "version.created"} <= set(types)
    lines = connected("run", "events", played.run_id).out.splitlines()
    assert [int(line.split()[0]) for line in lines] == [each["sequence"] for each in as_json]
    assert any("update.quarantined" in line and "norm_outlier: 98.25 is far from 1.5" in line for line in lines)
    middle = as_json[5]["sequence"]
    followed = connected("run", "events", played.run_id, "--follow", "--after", str(middle), "--format", "json")
    assert followed.code == ExitCode.OK
    assert [json.loads(line) for line in followed.out.splitlines()] == as_json[6:]
    assert connected("run", "events", played.run_id, "--follow").out.splitlines() == lines


def test_a_run_shows_its_devices_and_bytes(connected: Cotune, played: Played) -> None:
    shown = connected("run", "show", played.run_id).out
    assert "completed, round 1 of 1, newest promoted version: 1" in shown
    assert "quarantined" in shown
    assert "Bytes up: adapter_delta" in shown


def test_an_id_is_never_folded(connected: Cotune, played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("command_line.output.PLAIN_WIDTH", 100)
    for name in ("run", "device"):
        shown = connected(name, "list").out
        for each in json.loads(connected(name, "list", "--format", "json").out):
            assert each[f"{name}_id"] in shown
