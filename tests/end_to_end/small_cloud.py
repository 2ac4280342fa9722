"""A whole Cotune on 127.0.0.1, made of real processes and models of a few thousand parameters."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from command_line.api_client import ApiClient
from command_line.demo_devices import DemoDevice, enrol_and_start
from command_line.embedded import HOST, cloud_environment, cloud_specs, wait_until_ready, without_our_settings
from command_line.folders import make_operator_key
from command_line.ports import free_port
from command_line.supervisor import Supervisor
from protocol.events import Event, EventType
from protocol.runs import Round, Run
from protocol.statuses import RunStatus

FINISHED = (RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STOPPED)
# A killed worker is noticed after seconds and not after half a minute.
IMPATIENT = {"COTUNE_LEASE_SECONDS": "3", "COTUNE_RESEND_AFTER_SECONDS": "2", "COTUNE_SWEEP_SECONDS": "0.5"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass
class SmallCloud:
    """The processes, and a client of the API. Use as a context manager.

    Args:
        folder: For state, logs and devices.
        models: Model folders by name: `llm`, `slm-0`, ...
        data: Data files by name: `public`, `test`, `device-0`, ...
        environment: What every process is given beside our own environment.
    """

    folder: Path
    models: dict[str, Path]
    data: dict[str, Path]
    environment: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    agents: list[str] = field(default_factory=list)
    """Ids of the devices that have an agent; tests enrol others, which have none."""

    def __enter__(self) -> Self:
        home = self.folder / "cloud"
        logs = self.folder / "logs"
        for each in (home, logs):
            each.mkdir(parents=True)
        self.key = make_operator_key(home).read_text(encoding="ascii").strip()
        self.address = f"http://{HOST}:{free_port()}"
        environment = without_our_settings() | OFFLINE | self.environment
        self.supervisor = Supervisor(logs, notify=self.notices.append, environment=environment).__enter__()
        try:
            for spec in cloud_specs(HOST, int(self.address.rpartition(":")[2]), self._settings(home)):
                self.supervisor.start(spec)
            self.client = ApiClient(self.address, self.key)
            wait_until_ready(self.client, self.supervisor)
        except BaseException:
            self.supervisor.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.__exit__(kind, error, trace)
        self.supervisor.stop()

    def start_agents(self, count: int) -> None:
        """Enrol and start `count` agents, `device-0` and so on."""
        devices = [
            DemoDevice(
                name=f"device-{index}",
                domain=f"domain-{index}",
                model=self.models[f"slm-{index}"],
                train=self.data[f"device-{index}"],
                test=self.data["test"],
                home=self.folder / "devices" / f"device-{index}",
            )
            for index in range(count)
        ]
        enrol_and_start(devices, self.client, self.supervisor, {"COTUNE_TORCH_THREADS": "1"})
        self.agents = [each.device_id for each in self.client.list_devices()]

    def agent(self, *arguments: str) -> list[str]:
        """The command line of a `cotune-agent`."""
        return [sys.executable, "-m", "edge_agent", *arguments]

    def run_config(self, name: str, **changes: Any) -> dict[str, Any]:
        """A run of all agents, small enough for seconds; `changes` replace its fields."""
        lora = {"rank": 2, "alpha": 4.0}
        config: dict[str, Any] = {
            "name": name,
            "rounds": 2,
            "llm": str(self.models["llm"]),
            "public_data": str(self.data["public"]),
            "evaluation_data": str(self.data["test"]),
            "probe_rows": 8,
            "device_ids": self.agents,
            "min_updates": len(self.agents),
            "grace_seconds": 30.0,
            "round_deadline_seconds": 120.0,
            "proxy": {"source": "prune", "layers": 1, "steps": 2, "batch_size": 4, "max_length": 64},
            "evaluation": {"validation_rows": 4, "test_rows": 4, "max_new_tokens": 4},
            "strategy": {
                "name": "co_plms",
                "slm_lora": lora,
                "proxy_lora": lora,
                "llm_lora": lora,
                "training": {"steps": 2, "batch_size": 4, "max_length": 64},
                "domain_steps": 1,
                "top_k": 8,
                "server": {"steps": 2, "batch_size": 4, "max_length": 64},
            },
        }
        return config | changes

    def wait(self, condition: Callable[[], bool], *, seconds: float = 90.0, every_seconds: float = 0.1) -> None:
        """Keep the processes alive until `condition` holds; fail with the news if it does not in time."""
        deadline = time.monotonic() + seconds

        def done() -> bool:
            assert time.monotonic() < deadline, f"it did not happen in {seconds:.0f} s; news: {self.notices}"
            return condition()

        self.supervisor.keep_alive(done, every_seconds=every_seconds)

    def wait_for_run(self, run_id: str, *, seconds: float = 90.0) -> Run:
        """Wait until a run has ended and return it."""
        self.wait(lambda: self.client.get_run(run_id).status in FINISHED, seconds=seconds)
        return self.client.get_run(run_id)

    def kill(self, name: str) -> None:
        """`kill -9` a supervised process."""
        os.kill(self.supervisor.process_ids()[name], signal.SIGKILL)

    def events(self, run_id: str) -> list[Event]:
        """Every event of a run."""
        events: list[Event] = []
        while more := self.client.events(run_id, after=events[-1].sequence if events else 0):
            events += more
        return events

    def as_device(self, credential: str) -> httpx.Client:
        """A client that speaks as a device, for what no honest agent would say."""
        return httpx.Client(
            base_url=self.address, headers={"Authorization": f"Bearer {credential}"}, timeout=40, trust_env=False
        )

    def _settings(self, home: Path) -> dict[str, str]:
        return cloud_environment(home, torch_threads=1) | IMPATIENT


def assert_counted_once(rounds: Iterable[Round], events: Iterable[Event], devices: set[str]) -> None:
    """Every device is in every round with one counted update, and became `counted` once."""
    for each in rounds:
        assert {device.device_name: device.status.value for device in each.devices} == dict.fromkeys(devices, "counted")
        assert each.metrics["num_updates"] == len(devices)
    transitions = [
        (event.round_id, event.device_id)
        for event in events
        if event.type is EventType.ASSIGNMENT_STATUS_CHANGED and event.data.get("to") == "counted"
    ]
    assert len(transitions) == len(set(transitions)) == len(devices) * len(list(rounds))


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    """Write JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
