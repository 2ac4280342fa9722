"""Rounds of the real service: API, worker and controller as `cotune up` starts them, and devices that echo.

The adapter is what the round is about, so its model is as small as it can be: LoRA of rank 1024 on the four attention
matrices of two layers 160 wide makes 16 tensors and 10 MiB. The strategy is Co-PLMs with everything at zero that FedAvg
does not have: no step of distillation, none of mutual learning on the server, no teaching by the devices' logits. What
is left of it and Flower has not: a file of logits of a few hundred bytes from each device, a tiny model that is loaded
and evaluated on one row, and that every step is durable (SQLite and files, synchronised) before the next begins.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.processes import Usage
from benchmarks.service import PROFILE
from command_line.api_client import ApiClient
from command_line.embedded import (
    HOST,
    cloud_environment,
    cloud_specs,
    wait_until_ready,
    without_our_settings,
)
from command_line.ports import free_port
from command_line.supervisor import ProcessSpec, Supervisor, peak_memory_bytes, tail
from protocol.assignments import Assignment
from protocol.devices import EnrolmentTokenCreate
from protocol.events import Event, EventType
from protocol.runs import Round
from protocol.statuses import RoundStatus, RunStatus

TENSORS, ROWS, COLUMNS = 16, 1024, 160
"""Float32: 10 MiB."""

SERVER = "server"
DEVICE_PROCESSES = 2
LOOK_SECONDS = 0.2
RUN_SECONDS = 600.0
OVER = (RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STOPPED)
_SMALL = {"rank": 2, "alpha": 4.0}
STRATEGY: dict[str, Any] = {
    "name": "co_plms",
    "slm_lora": _SMALL,
    "llm_lora": _SMALL,
    "proxy_lora": {"rank": ROWS, "alpha": 4.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "top_k": 8,
    # An echo is as large as the adapter itself; at a rate of 1 its norm would double every round.
    "server_learning_rate": 1e-3,
    "server": {"steps": 0, "batch_size": 4, "max_length": 64, "device_teacher": "off"},
}


@dataclass(frozen=True)
class RoundTimes:
    """One round, in seconds from its opening.

    Attributes:
        aggregated: until the mean of the updates is committed.
        published: until the next version is there, and the next round open.
        cpu_seconds: of the API, the worker and the controller meanwhile.
        stages: what the worker says of its parts.
    """

    aggregated: float
    published: float
    cpu_seconds: float
    stages: dict[str, float]


class Cloud:
    """The running service, its operator, and its devices that wait for work."""

    def __init__(self, folder: Path, supervisor: Supervisor, client: ApiClient) -> None:
        self._folder = folder
        self._supervisor = supervisor
        self._client = client
        self._device_ids: list[str] = []
        self._credentials: list[str] = []
        self._devices: list[subprocess.Popen[bytes]] = []

    def process_ids(self) -> dict[str, int]:
        """Of the API, the worker and the controller."""
        return self._supervisor.process_ids()

    def peak_bytes(self) -> dict[str, int]:
        """The most memory that each process has held (VmHWM)."""
        return {name: peak_memory_bytes(pid) for name, pid in self.process_ids().items()}

    def add_devices(self, count: int) -> None:
        """Enrol devices, play a round's beginning to make their logits, and let them all wait for work."""
        token = self._client.create_token(EnrolmentTokenCreate(uses=count)).token
        for number in range(count):
            body = {"token": token, "name": f"device-{number}", "profile": PROFILE}
            receipt = httpx.post(f"{self._client.server}/v1/devices", json=body, trust_env=False)
            device = receipt.raise_for_status().json()
            self._device_ids.append(device["device_id"])
            self._credentials.append(device["credential"])
        run_id = self._create_run(1)
        logits = self._make_logits(self._first_assignment())
        for number in range(DEVICE_PROCESSES):
            self._start_devices(number, logits)
        self._wait_for(run_id)

    def play(self, rounds: int) -> list[Round]:
        """Play a run of so many rounds to its end."""
        run_id = self._create_run(rounds)
        self._wait_for(run_id)
        return self._client.list_rounds(run_id)

    def times(self, played: Sequence[Round], usage: Usage) -> list[RoundTimes]:
        """Say how long rounds took, and what of the processor."""
        events = self._events(played[0].run_id)
        found = []
        for each in played:
            assert each.finished_at is not None
            (aggregated,) = (event.time for event in events if _ends_aggregation(event, each.round_id))
            opened, finished = each.opened_at.timestamp(), each.finished_at.timestamp()
            found.append(
                RoundTimes(
                    aggregated.timestamp() - opened,
                    finished - opened,
                    usage.cpu_seconds(SERVER, opened, finished),
                    each.metrics["seconds_by_stage"],
                )
            )
        return found

    def _events(self, run_id: str) -> list[Event]:
        events: list[Event] = []
        while page := self._client.events(run_id, after=events[-1].sequence if events else 0):
            events += page
        return events

    def _create_run(self, rounds: int) -> str:
        return self._client.create_run(
            {
                "name": "rounds",
                "rounds": rounds,
                "llm": str(self._folder / "llm"),
                "public_data": str(self._folder / "public.jsonl"),
                "probe_rows": 1,
                "device_ids": self._device_ids,
                "min_updates": len(self._device_ids),
                "proxy": {"source": "prune", "layers": 2, "steps": 0, "batch_size": 4, "max_length": 64},
                "evaluation": {
                    "validation_rows": 1, "test_rows": 0, "max_new_tokens": 1, "tolerance_bits_per_byte": 100.0,
                },
                "strategy": STRATEGY,
            }
        ).run_id  # fmt: skip

    def _first_assignment(self) -> Assignment:
        headers = {"Authorization": f"Bearer {self._credentials[0]}"}
        deadline = time.monotonic() + RUN_SECONDS
        with httpx.Client(base_url=self._client.server, headers=headers, trust_env=False, timeout=40) as http:
            while time.monotonic() < deadline:
                response = http.get("/v1/devices/me/assignment?wait_seconds=20").raise_for_status()
                if response.status_code == httpx.codes.OK:
                    return Assignment.model_validate_json(response.content)
                self._supervisor.check()
        raise TimeoutError(f"no round was opened within {RUN_SECONDS:.0f} s; logs: {self._supervisor.logs}")

    def _make_logits(self, assignment: Assignment) -> Path:
        assert assignment.proxy_manifest is not None
        assert assignment.probe_set is not None
        assert assignment.adapter is not None
        path = self._folder / "logits.safetensors"
        hashes = [ref.sha256 for ref in (assignment.proxy_manifest, assignment.probe_set, assignment.adapter)]
        scratch = self._folder / "scratch"
        _make(
            "make_logits",
            [self._folder / "home" / "blobs", *hashes, assignment.strategy.model_dump_json(), scratch, path],
        )
        return path

    def _start_devices(self, number: int, logits: Path) -> None:
        mine = slice(number, None, DEVICE_PROCESSES)
        order = {
            "credentials": self._credentials[mine],
            "numbers": list(range(len(self._credentials)))[mine],
            "logits": str(logits),
            "folder": str(self._folder),
        }
        file = self._folder / f"devices-{number}.json"
        file.write_text(json.dumps(order))
        command = [sys.executable, "-m", "benchmarks.round_devices", self._client.server, str(file)]
        self._devices.append(self._supervisor.run(ProcessSpec(f"devices-{number}", command)))

    def _wait_for(self, run_id: str) -> None:
        deadline = time.monotonic() + RUN_SECONDS
        while (run := self._client.get_run(run_id)).status not in OVER:
            self._supervisor.check()
            for number, process in enumerate(self._devices):
                if process.poll() is not None:
                    raise RuntimeError(f"devices ended:\n{tail(self._supervisor.logs / f'devices-{number}.log')}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not over within {RUN_SECONDS:.0f} s: {run.status}; logs: {self._supervisor.logs}")
            time.sleep(LOOK_SECONDS)
        if run.status is not RunStatus.COMPLETED:
            raise RuntimeError(f"the run {run.status}: {run.status_reason}; logs: {self._supervisor.logs}")


@contextmanager
def running_cloud(folder: Path, devices: int) -> Iterator[Cloud]:
    """Start the service in `folder` with devices that have played their first round.

    Raises:
        CommandError: it does not start.
    """
    (folder / "logs").mkdir(parents=True)
    _make("make_llm", [folder / "llm", folder / "public.jsonl", COLUMNS])
    key, port = secrets.token_hex(32), free_port()
    environment = cloud_environment(folder / "home", torch_threads=1)
    environment |= {"COTUNE_OPERATOR_KEY": key, "COTUNE_LOG_LEVEL": "error"}
    # All devices of the benchmark are at one address.
    environment |= {f"COTUNE_RATE_{name}": "100000/100000" for name in ("ADDRESS", "ENROLMENT", "DEVICE")}
    with (
        Supervisor(folder / "logs", notify=print, environment=without_our_settings()) as supervisor,
        ApiClient(f"http://{HOST}:{port}", key, timeout_seconds=60) as client,
    ):
        for spec in cloud_specs(HOST, port, environment):
            supervisor.start(spec)
        wait_until_ready(client, supervisor)
        cloud = Cloud(folder, supervisor, client)
        cloud.add_devices(devices)
        yield cloud


def _ends_aggregation(event: Event, round_id: str) -> bool:
    to = event.data.get("to")
    return event.type is EventType.ROUND_STATUS_CHANGED and event.round_id == round_id and to == RoundStatus.CO_TUNING


def _make(what: str, arguments: Sequence[object]) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos.files", what, *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
