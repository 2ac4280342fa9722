"""A run that was played to its end: four devices, one for each thing that can become of an update."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from structlog.testing import capture_logs

from cloud_api.cloud import open_cloud
from cloud_api.settings import Settings
from command_line.embedded import cloud_environment
from persistence import artifacts, results, rounds, updates
from protocol.assignments import Assignment
from protocol.errors import ErrorCode
from protocol.headers import PEFT
from protocol.runs import Run
from tests.cloud_api.running_api import DeviceClient, delta_for, logits, safetensors
from tests.cloud_api.running_api import RunningApi as PlayedApi
from tests.command_line.conftest import RunningApi

GRACE = timedelta(hours=1)
"""Nobody waits for it: the clock of the worker's part is moved."""

LLM_ADAPTER = safetensors(fill=2)
SCORES = {"rouge_l": 71.5, "exact_match": 42.0, "bits_per_byte": 0.75, "num_rows": 8}


@dataclass(frozen=True)
class Played:
    """The run, completed after one round, and its devices by what became of their updates."""

    run_id: str
    devices: dict[str, str]


def play(api: RunningApi) -> Played:
    """Create a run of four devices over HTTP, and do the worker's part with `persistence`."""
    cloud = open_cloud(Settings.from_environment(cloud_environment(api.home)))
    headers = {"Authorization": f"Bearer {api.key}"}
    operator = httpx.Client(base_url=api.address, headers=headers, timeout=60, trust_env=False)
    player = PlayedApi(cloud, api.address, operator)
    try:
        with capture_logs():  # else what is printed here would be part of what a command prints
            return _play(player)
    finally:
        player.close()
        cloud.database.dispose()


def _play(player: PlayedApi) -> Played:
    devices = {fate: player.enrol(fate) for fate in ("counted", "quarantined", "rejected", "late")}
    run = player.create_run(
        device_ids=[each.device_id for each in devices.values()],
        name="played", min_updates=1, grace_seconds=GRACE.seconds, late_updates="keep",
    )  # fmt: skip
    peft = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": None}
    player.prepare(run, metrics={PEFT: {"llm": peft, "proxy": peft}})
    assignments = {fate: device.poll(wait_seconds=20) for fate, device in devices.items()}
    for fate, device in devices.items():
        if fate == "late":
            with player.cloud.database.transaction() as session:
                assert rounds.close_due_rounds(session, datetime.now(UTC) + GRACE) == 1
        _hand_in(device, assignments[fate])
    _publish(player, run, {fate: each.assignment_id for fate, each in assignments.items() if each is not None}, devices)
    return Played(run.run_id, {fate: device.device_id for fate, device in devices.items()})


def _hand_in(device: DeviceClient, assignment: Assignment | None) -> None:
    assert assignment is not None
    parts = {"adapter_delta": delta_for(assignment, fill=1), "logits": logits(1)}
    for kind, content in parts.items():
        response = device.upload(assignment, kind, content)
        assert response.is_success, response.text
    submitted = device.submit(assignment, parts)
    assert submitted.status_code == 201, submitted.text


def _publish(player: PlayedApi, run: Run, ids: dict[str, str], devices: dict[str, DeviceClient]) -> None:
    now = datetime.now(UTC) + GRACE
    proxy, llm = (player.cloud.blobs.put_bytes(content) for content in (safetensors(fill=1), LLM_ADAPTER))
    norms = {"update_norms": {devices["counted"].device_id: 1.5, devices["quarantined"].device_id: 98.25}}
    with player.cloud.database.transaction() as session:
        for blob in (proxy, llm):
            artifacts.register(session, blob.sha256, blob.size, "adapter", run.run_id, now)
        updates.quarantine_update(session, ids["quarantined"], ErrorCode.NORM_OUTLIER, "98.25 is far from 1.5", now)
        updates.reject_update(session, ids["rejected"], ErrorCode.NON_FINITE_VALUES, "nan in a.lora_A.weight", now)

        def finish(function: Callable[..., None], *arguments: Any) -> None:
            function(session, player._claim(session, run.run_id, now), "worker", *arguments, now)

        finish(results.finish_aggregation, proxy.sha256, [ids["counted"]], norms)
        finish(results.finish_co_tuning, results.Candidate(proxy.sha256, llm.sha256), {})
        finish(results.finish_evaluation, {"validation": {"llm": SCORES}}, True)
