"""Whole runs through real processes: everything alive, an agent killed, the worker killed, the API killed."""

import hashlib
import sqlite3
import time
from pathlib import Path

import httpx

from protocol.events import EventType
from protocol.statuses import AssignmentStatus, RoundStatus, RunStatus
from tests.end_to_end.conftest import DEVICES, SECRET_WORDS
from tests.end_to_end.small_cloud import SmallCloud, assert_counted_once

NAMES = {f"device-{index}" for index in range(DEVICES)}


def test_a_run_goes_from_its_creation_to_published_versions(cloud: SmallCloud) -> None:
    # A seed of its own: what a device has already, by hash, it does not fetch again.
    run = cloud.wait_for_run(cloud.client.create_run(cloud.run_config("whole", seed=1)).run_id)
    assert run.status is RunStatus.COMPLETED, run.status_reason
    rounds = cloud.client.list_rounds(run.run_id)
    assert [each.status for each in rounds] == [RoundStatus.PUBLISHED] * 2
    assert_counted_once(rounds, cloud.events(run.run_id), NAMES)

    versions = cloud.client.list_versions(run.run_id)
    assert [each.number for each in versions] == [0, 1, 2]
    assert set(versions[0].metrics["test"]) == set(versions[-1].metrics["test"]) == {"llm", "proxy"}
    first, last = rounds[0].devices[0].metrics, rounds[-1].devices[0].metrics
    assert first["before"] is not None
    assert last["after"]["num_rows"] == 4
    assert 0 < first["alignment"]["coverage"] <= 1

    traffic = cloud.client.traffic(run.run_id)
    assert all(traffic.up[kind] > 0 for kind in ("adapter_delta", "logits", "metrics"))
    assert all(traffic.down[kind] > 0 for kind in ("proxy_base", "adapter", "probe_set"))


def test_a_published_adapter_is_the_file_that_its_hash_names(cloud: SmallCloud) -> None:
    run = next(each for each in cloud.client.list_runs() if each.name == "whole")
    version = cloud.client.list_versions(run.run_id)[-1]
    answer = httpx.get(
        f"{cloud.address}/v1/runs/{run.run_id}/versions/{version.number}/adapters/proxy",
        headers={"Authorization": f"Bearer {cloud.key}"},
        trust_env=False,
    )
    assert answer.status_code == 200
    assert hashlib.sha256(answer.content).hexdigest() == version.proxy_adapter_sha256


def test_no_private_row_is_anywhere_in_the_cloud(cloud: SmallCloud) -> None:
    home = cloud.folder / "cloud"
    with sqlite3.connect(home / "cotune.sqlite3") as database:
        database.execute("PRAGMA wal_checkpoint(FULL)")
    files = [path for path in home.rglob("*") if path.is_file()]
    assert any("blobs" in path.parts for path in files)
    words = [f"follows {word}".encode() for word in SECRET_WORDS]
    assert [path for path in files if any(word in path.read_bytes() for word in words)] == []


def test_standalone_tuning_sends_only_numbers(cloud: SmallCloud) -> None:
    strategy = {"name": "standalone", "training": {"steps": 2, "batch_size": 4, "max_length": 64}}
    config = cloud.run_config("alone", strategy=strategy, rounds=1) | dict.fromkeys(
        ("llm", "public_data", "evaluation_data")
    )
    run = cloud.wait_for_run(cloud.client.create_run(config).run_id)
    assert run.status is RunStatus.COMPLETED, run.status_reason
    assert_counted_once(cloud.client.list_rounds(run.run_id), cloud.events(run.run_id), NAMES)
    traffic = cloud.client.traffic(run.run_id)
    assert {kind for kind, count in traffic.up.items() if count} == {"metrics"}


def test_kill_9_of_an_agent_in_the_middle_of_training(cloud: SmallCloud) -> None:
    config = cloud.run_config("agent-killed")
    config["strategy"]["training"]["steps"] = 60
    run_id = cloud.client.create_run(config).run_id

    def trains() -> bool:
        run = cloud.client.get_run(run_id)
        assert run.status is not RunStatus.FAILED, run.status_reason
        if not run.current_round:
            return False
        devices = {each.device_name: each for each in cloud.client.get_round(run_id, 1).devices}
        return "device-1" in devices and devices["device-1"].status is AssignmentStatus.TRAINING

    cloud.wait(trains, every_seconds=0.02)
    cloud.kill("device-1")
    before = {each.name: each.device_id for each in cloud.client.list_devices()}
    run = cloud.wait_for_run(run_id)
    assert run.status is RunStatus.COMPLETED, run.status_reason
    assert_counted_once(cloud.client.list_rounds(run_id), cloud.events(run_id), NAMES)
    assert {each.name: each.device_id for each in cloud.client.list_devices()} == before
    assert any("device-1 was ended by SIGKILL" in notice for notice in cloud.notices)


def test_kill_9_of_the_worker_in_the_middle_of_aggregation(cloud: SmallCloud) -> None:
    config = cloud.run_config("worker-killed", rounds=3)
    config["strategy"]["proxy_lora"] = {"rank": 256, "alpha": 256.0}  # more to average: the middle lasts longer
    run_id = cloud.client.create_run(config).run_id
    killed_in: list[RoundStatus] = []
    seen = 0

    def aggregates() -> bool:
        """Kill as soon as the worker has claimed an aggregation; true once that was in the middle of it."""
        nonlocal seen
        run = cloud.client.get_run(run_id)
        assert run.status not in (RunStatus.FAILED, RunStatus.STOPPED), run.status_reason
        for event in cloud.client.events(run_id, after=seen):
            seen = event.sequence
            if event.type is EventType.JOB_CLAIMED and event.data.get("kind") == "aggregate_round":
                cloud.kill("worker")
                killed_in.append(cloud.client.get_round(run_id, run.current_round).status)
        return RoundStatus.AGGREGATING in killed_in or run.status is RunStatus.COMPLETED

    cloud.wait(aggregates, every_seconds=0.005)
    assert RoundStatus.AGGREGATING in killed_in, f"the worker was always faster: killed in {killed_in}"
    run = cloud.wait_for_run(run_id)
    assert run.status is RunStatus.COMPLETED, run.status_reason
    assert_counted_once(cloud.client.list_rounds(run_id), cloud.events(run_id), NAMES)
    assert [each.number for each in cloud.client.list_versions(run_id)] == [0, 1, 2, 3]


def test_kill_9_of_the_api_loses_nothing(cloud: SmallCloud) -> None:
    run_id = cloud.client.create_run(cloud.run_config("api-killed")).run_id
    cloud.wait(lambda: cloud.client.get_run(run_id).current_round == 1, every_seconds=0.02)
    cloud.kill("api")
    time.sleep(0.5)
    from command_line.embedded import wait_until_ready

    wait_until_ready(cloud.client, cloud.supervisor)
    run = cloud.wait_for_run(run_id)
    assert run.status is RunStatus.COMPLETED, run.status_reason
    assert_counted_once(cloud.client.list_rounds(run_id), cloud.events(run_id), NAMES)


def test_the_logs_hold_no_secret(cloud: SmallCloud) -> None:
    secrets = [cloud.key, *(path.read_text().strip() for path in cloud.folder.glob("devices/*/credential"))]
    assert len(secrets) == DEVICES + 1
    for log in cloud.supervisor.logs.iterdir():
        text = log.read_text(encoding="utf-8", errors="replace")
        assert not any(secret in text for secret in secrets), log
        assert not any(f"follows {word}" in text for word in SECRET_WORDS), log


def test_every_process_has_a_log(cloud: SmallCloud) -> None:
    logs = {path.stem for path in Path(cloud.supervisor.logs).iterdir()}
    assert {"api", "worker", "controller", *NAMES} <= logs
