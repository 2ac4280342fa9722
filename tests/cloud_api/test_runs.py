"""Runs, rounds and versions, as operators use them."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from protocol.errors import ErrorCode
from tests.cloud_api.running_api import RunningApi, eventually

CONFIG = {"name": "run", "strategy": {"name": "co_plms"}, "rounds": 1, "llm": "hub/llm", "public_data": "hub/data"}


def refused(response: httpx.Response, code: ErrorCode, status: int) -> dict[str, Any]:
    problem: dict[str, Any] = response.json()
    assert (problem["code"], response.status_code) == (code.value, status), problem
    return problem


@pytest.mark.parametrize("field", ["llm", "slm", "proxy.path"])
@pytest.mark.parametrize("shape", ["/no/such/folder", "./no/such/folder", "~/no-such-folder-of-cotune"])
def test_a_model_folder_that_is_not_there(api: RunningApi, field: str, shape: str) -> None:
    changed: dict[str, Any] = {field: shape}
    if field == "proxy.path":
        changed = {"proxy": {"source": "pretrained", "path": shape}}
    problem = refused(api.operator.post("/v1/runs", json=CONFIG | changed), ErrorCode.MODEL_FOLDER_MISSING, 422)
    assert field in problem["detail"]
    assert problem["received"] == shape
    assert "config.json" in problem["expected"]


@pytest.mark.parametrize("field", ["public_data", "evaluation_data"])
def test_a_data_file_that_is_not_there(api: RunningApi, field: str) -> None:
    response = api.operator.post("/v1/runs", json=CONFIG | {field: "/no/such/file.jsonl"})
    problem = refused(response, ErrorCode.DATA_FILE_INVALID, 422)
    assert field in problem["detail"]
    assert problem["received"] == "/no/such/file.jsonl"


def test_folders_and_files_that_are_there_and_hub_names_pass(api: RunningApi, tmp_path: Path) -> None:
    data = tmp_path / "public.jsonl"
    data.write_text("{}\n")
    folder = tmp_path / "llm"
    folder.mkdir()
    empty = api.operator.post("/v1/runs", json=CONFIG | {"llm": str(folder), "public_data": str(data)})
    assert "a folder without it" in refused(empty, ErrorCode.MODEL_FOLDER_MISSING, 422)["detail"]
    (folder / "config.json").write_text("{}")
    assert api.create_run(llm=str(folder), public_data=str(data)).config.llm == str(folder)
    assert api.create_run(llm="Qwen/Qwen2.5-0.5B", public_data="tatsu-lab/alpaca").status == "pending"


def test_a_run_that_contradicts_itself_is_refused(api: RunningApi) -> None:
    for changed in ({"llm": None}, {"min_updates": 3, "max_updates": 2}, {"proxy": {"source": "pretrained"}}):
        refused(api.operator.post("/v1/runs", json=CONFIG | changed), ErrorCode.INVALID_FIELD, 422)
    for rounds in (0, -1, 10_001, 1.5, "many"):
        problem = refused(api.operator.post("/v1/runs", json=CONFIG | {"rounds": rounds}), ErrorCode.INVALID_FIELD, 422)
        assert [each["field"] for each in problem["errors"]] == ["rounds"]
    pooled = api.operator.post("/v1/runs", json=CONFIG | {"strategy": {"name": "centralized"}})
    detail = refused(pooled, ErrorCode.INVALID_FIELD, 422)["detail"]
    assert "strategy `centralized` trains on all devices' rows in one place" in detail
    assert "exists in simulations and cannot be deployed" in detail
    unknown = api.operator.post("/v1/runs", json=CONFIG | {"device_ids": ["dev_0"]})
    refused(unknown, ErrorCode.DEVICE_NOT_FOUND, 404)


def test_a_new_run_is_sent_to_the_worker(api: RunningApi) -> None:
    def messages() -> list[Path]:
        return list((api.cloud.settings.home / "queue").glob("*.msg"))

    before = len(messages())
    api.create_run()
    eventually(lambda: len(messages()) == before + 1)
    newest = max(messages(), key=lambda path: path.stat().st_mtime_ns)
    eventually(lambda: "cotune.prepare_run" in newest.read_text())  # it is there before it is written


def test_a_run_is_shown_listed_stopped_and_stays_stopped(fresh_api: RunningApi) -> None:
    names = [f"run {index}" for index in range(5)]
    runs = [fresh_api.create_run(name=name) for name in names]
    listed, cursor = [], None
    while True:
        page = fresh_api.operator.get("/v1/runs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        listed += [item["name"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert listed == names[::-1]
    path = f"/v1/runs/{runs[0].run_id}"
    stopped = fresh_api.operator.post(f"{path}/stop", json={"reason": "wrong data"}).json()
    assert (stopped["status"], stopped["status_reason"]) == ("stopped", "wrong data")
    assert fresh_api.operator.post(f"{path}/stop").json() == stopped
    assert fresh_api.operator.get(path).json() == stopped
    only = fresh_api.operator.get("/v1/runs", params={"status": "stopped"}).json()["items"]
    assert [item["name"] for item in only] == ["run 0"]
    refused(fresh_api.operator.get("/v1/runs", params={"limit": 0}), ErrorCode.INVALID_FIELD, 422)


def test_rounds_and_versions_of_a_run(api: RunningApi) -> None:
    device = api.enrol("one")
    run = api.running_run(device)
    device.poll()
    path = f"/v1/runs/{run.run_id}"
    rounds = api.operator.get(f"{path}/rounds").json()["items"]
    assert [each["number"] for each in rounds] == [1]
    assert rounds[0] == api.operator.get(f"{path}/rounds/1").json()
    assert [each["device_name"] for each in rounds[0]["devices"]] == ["one"]
    refused(api.operator.get(f"{path}/rounds/2"), ErrorCode.ROUND_NOT_FOUND, 404)
    refused(api.operator.get(f"{path}/rounds/{10**30}"), ErrorCode.ROUND_NOT_FOUND, 404)
    refused(api.operator.get(f"{path}/rounds/0"), ErrorCode.INVALID_FIELD, 422)
    versions = api.operator.get(f"{path}/versions").json()["items"]
    shown = api.operator.get(f"{path}/versions/0").json()
    assert [step["number"] for step in shown["lineage"]] == [0]
    assert versions == [shown | {"lineage": []}]
    refused(api.operator.get(f"{path}/versions/1"), ErrorCode.VERSION_NOT_FOUND, 404)
    for name in ("proxy", "llm"):
        file = api.operator.get(f"{path}/versions/0/adapters/{name}")
        assert file.headers["ETag"] == f'"{versions[0][f"{name}_adapter_sha256"]}"'
        assert file.content.decode().endswith(run.run_id)
    refused(api.operator.get(f"{path}/versions/0/adapters/other"), ErrorCode.INVALID_FIELD, 422)


def test_a_version_without_adapters_says_so(api: RunningApi) -> None:
    run = api.create_run(strategy={"name": "standalone"}, llm=None, public_data=None)
    api.prepare(run, with_files=False)
    response = api.operator.get(f"/v1/runs/{run.run_id}/versions/0/adapters/llm")
    refused(response, ErrorCode.ARTIFACT_NOT_FOUND, 404)


def test_devices_are_listed_shown_and_say_that_they_are_alive(fresh_api: RunningApi) -> None:
    devices = [fresh_api.enrol(f"device-{index}") for index in range(3)]
    page = fresh_api.operator.get("/v1/devices", params={"limit": 2}).json()
    assert [each["name"] for each in page["items"]] == ["device-0", "device-1"]
    rest = fresh_api.operator.get("/v1/devices", params={"cursor": page["next_cursor"]}).json()
    assert [each["name"] for each in rest["items"]] == ["device-2"]
    receipt = devices[0].http.post("/v1/devices/me/heartbeat", json={"activity": "waiting", "reason": "on battery"})
    assert receipt.json()["next_within_seconds"] == fresh_api.cloud.settings.heartbeat_seconds
    shown = fresh_api.operator.get(f"/v1/devices/{devices[0].device_id}").json()
    assert (shown["activity"], shown["reason"]) == ("waiting", "on battery")
    assert devices[0].http.get("/v1/devices/me").json() == shown
    assert "credential" not in str(shown)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ('"strategy": {"name": "co_plms", "max_update_norm": 1e999}', "strategy.max_update_norm"),
        ('"strategy": {"name": "co_plms"}, "proxy": {"learning_rate": 1e999}', "proxy.learning_rate"),
        (
            '"strategy": {"name": "co_plms"}, "evaluation": {"tolerance_bits_per_byte": 1e999}',
            "evaluation.tolerance_bits_per_byte",
        ),
    ],
)
def test_a_setting_too_large_for_a_number_is_refused_and_the_list_of_runs_lives(
    api: RunningApi, settings: str, field: str
) -> None:
    body = f'{{"name": "run", "rounds": 1, "llm": "hub/llm", "public_data": "hub/data", {settings}}}'
    response = api.operator.post("/v1/runs", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422, response.text
    assert field in response.json()["detail"]
    assert api.operator.get("/v1/runs").status_code == 200
