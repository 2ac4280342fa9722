"""Plays runs while faults happen, and looks at what is left of each."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos import invariants
from benchmarks.chaos.cloud import API, BROKER, DATABASE, WORKER, Cloud
from benchmarks.chaos.invariants import Adapters
from benchmarks.chaos.network import Request, SpoilingProxy
from benchmarks.chaos.plan import ANY_TIME, KILL, Fault, Plan, moment_of
from persistence import events, runs, versions
from persistence.tables import JobRow
from protocol.events import Event, EventType
from protocol.queue import embedded_broker_url, queue_folder
from protocol.runs import Run
from protocol.statuses import RunStatus

DEVICES = 3
POLL_SECONDS = 0.01
PAUSE_SECONDS = 0.4
"""Between two kills: several may hit one stage, but not all of them one moment."""

MOST_ATTEMPTS = 2
"""A job that was begun so often is left in peace: the fifth failure ends its run, as it must."""

LATEST_IN_STAGE_SECONDS = 0.5
LATEST_IN_FLIGHT_SECONDS = 0.03
RANDOM_SECONDS = 2.0
"""Mean time between faults that wait for no moment."""

RUN_SECONDS = 150.0
OVER = (RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STOPPED)
_LORA = {"rank": 2, "alpha": 4.0}
STRATEGY: dict[str, Any] = {
    "name": "co_plms",
    "slm_lora": _LORA,
    "proxy_lora": _LORA,
    "llm_lora": _LORA,
    "training": {"steps": 1, "batch_size": 4, "max_length": 64},
    "domain_steps": 1,
    "top_k": 8,
    "server": {"steps": 2, "batch_size": 4, "max_length": 64},
}


def run_config(name: str, files: Path, rounds: int, **changes: Any) -> dict[str, Any]:
    """A run whose rounds take about a second, and always the same updates."""
    return {
        "name": name,
        "rounds": rounds,
        "llm": str(files / "llm"),
        "public_data": str(files / "public.jsonl"),
        "probe_rows": 4,
        "min_updates": DEVICES,
        "grace_seconds": 60.0,
        "round_deadline_seconds": 600.0,
        "proxy": {"source": "prune", "layers": 1, "steps": 2, "batch_size": 4, "max_length": 64},
        "evaluation": {
            "validation_rows": 4, "test_rows": 0, "max_new_tokens": 4, "tolerance_bits_per_byte": 100.0,
        },
        "strategy": STRATEGY,
        "seed": 7,
    } | changes  # fmt: skip


@dataclass
class Outcome:
    """What one run was."""

    name: str
    rounds: int
    seconds: float
    adapters: Adapters
    violations: list[str]


@dataclass
class Campaign:
    """One cloud, its devices, and the runs that they play.

    Args:
        cloud: running.
        plan: the faults.
        files: the LLM's folder, the public rows and the devices' logits.
        seed: of the milliseconds that are left to chance.
    """

    cloud: Cloud
    plan: Plan
    files: Path
    seed: int
    proxy: SpoilingProxy = field(init=False)
    devices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._busy_until = 0.0
        self._next_random = 0.0
        self._sequence = 0
        self._attempts = 0
        self._timers: list[threading.Timer] = []

    def __enter__(self) -> "Campaign":
        self.proxy = SpoilingProxy(self.cloud.port, self._decide, self.seed).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()
        self.proxy.__exit__()

    def add_devices(self) -> None:
        """Enrol the devices, in the order of their numbers, and start their agents."""
        for number in range(DEVICES):
            logits = self.files / f"logits-{number}.safetensors"
            self.devices.append(self.cloud.add_device(number, self.proxy.address, logits))

    def play(
        self,
        name: str,
        rounds: int,
        *,
        reference: Adapters | None = None,
        prepared: Callable[[Run], None] | None = None,
        each_round: Callable[[int], None] | None = None,
        **changes: Any,
    ) -> Outcome:
        """Play a run to its end with the plan's faults, if they are wanted, and say what does not hold.

        Args:
            prepared: called once when the run is running.
            each_round: called with the number of each round that opens.
        """
        started = time.monotonic()
        self.plan.where = name
        created = threading.Thread(target=self._create, args=(run_config(name, self.files, rounds, **changes),))
        self._run_id: str | None = None
        self._sequence = self.cloud.read(events.last_sequence)
        created.start()
        waiting, told = prepared, 0
        while time.monotonic() < started + RUN_SECONDS:
            new = self.cloud.read(events.list_events, run_id=None, after=self._sequence, limit=500)
            for event in new:
                self._sequence = event.sequence
                self._on_event(event, name)
                if event.type is EventType.ROUND_OPENED and each_round is not None and event.data["number"] > told:
                    told = event.data["number"]
                    each_round(told)
            self._at_random()
            if self._run_id is not None and (new or created.is_alive()):
                run = self.cloud.read(runs.get_run, self._run_id)
                if waiting is not None and run.status is RunStatus.RUNNING:
                    waiting(run)
                    waiting = None
                if run.status in OVER:
                    break
            time.sleep(POLL_SECONDS)
        created.join()
        assert self._run_id is not None
        history = self.cloud.read(invariants.read_history, self._run_id)
        found = invariants.violations(
            history,
            rounds=rounds,
            devices=self.devices,
            receipts=self.proxy.seen.receipts,
            reference=reference,
            blobs=self.cloud.blobs,
        )
        faults, self.proxy.seen.faults = self.proxy.seen.faults, []
        found += faults
        for fault in self.plan.happened:
            if fault.where.partition(",")[0] == name:
                fault.broken = bool(found)
        return Outcome(name, rounds, time.monotonic() - started, invariants.adapters(history), found)

    def version_files(self, run: Run) -> Mapping[str, str | None]:
        """The hashes that logits belong to."""
        version = self.cloud.read(versions.get_version, run.run_id, 0)
        return {"adapter": version.proxy_adapter_sha256}

    def _create(self, config: dict[str, Any]) -> None:
        self._run_id = str(self.cloud.ask("POST", "/v1/runs", json=config)["run_id"])

    def _on_event(self, event: Event, name: str) -> None:
        if event.type is EventType.ROUND_OPENED:
            self.plan.where = f"{name}, round {event.data['number']}"
        if event.type is EventType.JOB_CLAIMED:
            self._attempts = int(event.data["attempts"])
        moment = moment_of(event)
        if moment is None or time.monotonic() < self._busy_until or self._attempts > MOST_ATTEMPTS:
            return
        fault = self.plan.due(moment)
        if fault is None:
            return
        if event.type is EventType.JOB_CLAIMED:  # somewhere in the stage, not always at its first instruction
            time.sleep(self._random.uniform(0, LATEST_IN_STAGE_SECONDS))
        if self._strike(fault, event.data.get("job_id")):
            self.plan.happens(fault)
            self._busy_until = time.monotonic() + PAUSE_SECONDS

    def _at_random(self) -> None:
        now = time.monotonic()
        if now < max(self._next_random, self._busy_until) or self._attempts > MOST_ATTEMPTS:
            return
        self._next_random = now + self._random.expovariate(1 / RANDOM_SECONDS)
        fault = self.plan.due(ANY_TIME)
        if fault is not None and self._strike(fault, None):
            self.plan.happens(fault)
            self._busy_until = time.monotonic() + PAUSE_SECONDS

    def _strike(self, fault: Fault, job_id: str | None) -> bool:
        """Do a fault; False if its target is down already."""
        cloud = self.cloud
        if fault.target in (DATABASE, BROKER) and cloud.served and not cloud.alive(fault.target):
            return False
        match fault.kind, fault.target:
            case _, "device":
                return cloud.kill(f"device-{self._random.randrange(DEVICES)}")
            case "one connection's process killed", _ if cloud.postgresql is not None:
                return _done(cloud.postgresql.kill_one_backend)
            case "flushed", _ if cloud.redis is not None:
                return _done(cloud.redis.flush)
            case "messages removed", _:
                folder = queue_folder(embedded_broker_url(cloud.state))
                assert folder is not None
                for message in folder.glob("*.msg"):
                    message.unlink(missing_ok=True)
                return True
            case _, target if target == WORKER:
                return self._kill_worker(job_id)
            case _, target:
                return cloud.kill(target)

    def _kill_worker(self, job_id: str | None) -> bool:
        """Kill the worker that has the job; without one, either."""
        names = [WORKER, "worker-2"]
        if job_id is not None:
            owner = self.cloud.read(lambda session: session.get_one(JobRow, job_id).owner)
            for name in names:
                if owner and owner.split(":")[-2] == str(self.cloud.process_id(name)):
                    return self.cloud.kill(name)
        return self.cloud.kill(self._random.choice(names))

    def _decide(self, request: Request) -> Any:
        fault = self.plan.due(f"{request.kind} in flight", [KILL])
        if fault is not None:
            self.plan.happens(fault)
            self._later(lambda: self._strike(fault, None))
            return None
        return self.plan.tamper(request)

    def _later(self, action: Callable[[], Any]) -> None:
        timer = threading.Timer(self._random.uniform(0, LATEST_IN_FLIGHT_SECONDS), action)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def _done(action: Callable[[], None]) -> bool:
    try:
        action()
    except Exception:  # it is down for another reason; this fault comes again
        return False
    return True


def suspend(pid: int, seconds: float) -> None:
    """Stop a process for a while, as a machine that swaps."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


__all__ = ["API", "Campaign", "Outcome", "suspend"]
