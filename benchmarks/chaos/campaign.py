"""Plays runs while faults happen, and looks at what is left of each."""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import redis

from benchmarks.chaos import invariants
from benchmarks.chaos.cloud import BROKER, DATABASE, WORKER, Cloud
from benchmarks.chaos.hardship import deny_memory, fill, suspend
from benchmarks.chaos.invariants import Adapters
from benchmarks.chaos.network import Request, SpoilingProxy
from benchmarks.chaos.plan import ANY_TIME, KILL, RUN_MOMENTS, Fault, Plan, moment_of
from benchmarks.chaos.servers import PostgresqlServer, RedisServer
from persistence import events, runs
from persistence.tables import JobRow
from protocol.events import Event, EventType
from protocol.queue import embedded_broker_url, queue_folder
from protocol.runs import Run
from protocol.statuses import RunStatus

DEVICES = 3
POLL_SECONDS = 0.01
LOOK_SECONDS = 0.5
"""Between two looks at a run that says nothing."""

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
        self._attempts = 0
        self._run_id: str | None = None
        self._sequence = self.cloud.read(events.last_sequence)
        config = run_config(name, self.files, rounds, **changes)
        created = threading.Thread(target=self._create, args=(config,))
        created.start()
        self._watch(name, started + RUN_SECONDS, prepared, each_round)
        created.join()
        for timer in self._timers:
            timer.join()
        self._timers.clear()
        assert self._run_id is not None
        history = self.cloud.read(invariants.read_history, self._run_id)
        found = invariants.violations(
            history,
            rounds=rounds,
            devices=self.devices,
            receipts=self.proxy.seen.receipts,
            reference={number: pair for number, pair in (reference or {}).items() if number <= rounds},
            blobs=self.cloud.blobs,
        )
        faults, self.proxy.seen.faults = self.proxy.seen.faults, []
        found += faults
        for fault in self.plan.happened:
            if fault.where.partition(",")[0] == name:
                fault.broken = bool(found)
        return Outcome(name, rounds, time.monotonic() - started, invariants.adapters(history), found)

    def _watch(
        self,
        name: str,
        until: float,
        prepared: Callable[[Run], None] | None,
        each_round: Callable[[int], None] | None,
    ) -> None:
        """Strike at the moments of the plan until the run is over."""
        told, look_at = 0, 0.0
        while time.monotonic() < until:
            new = self.cloud.read(events.list_events, run_id=None, after=self._sequence, limit=500)
            for event in new:
                self._sequence = event.sequence
                self._on_event(event, name)
                if event.type is EventType.ROUND_OPENED and each_round is not None and event.data["number"] > told:
                    told = event.data["number"]
                    each_round(told)
            self._at_random()
            if self._run_id is not None and (new or time.monotonic() > look_at):
                look_at = time.monotonic() + LOOK_SECONDS
                run = self.cloud.read(runs.get_run, self._run_id)
                if prepared is not None and run.status is RunStatus.RUNNING:
                    prepared(run)
                    prepared = None
                if run.status in OVER:
                    return
            time.sleep(POLL_SECONDS)

    def _create(self, config: dict[str, Any]) -> None:
        self._run_id = str(self.cloud.ask("POST", "/v1/runs", json=config)["run_id"])

    def _on_event(self, event: Event, name: str) -> None:
        if event.type is EventType.ROUND_OPENED:
            self.plan.where = f"{name}, round {event.data['number']}"
        if event.type is EventType.JOB_CLAIMED:
            self._attempts = int(event.data["attempts"])
        moment = moment_of(event)
        if moment is None or self._attempts > MOST_ATTEMPTS:
            return
        if moment not in RUN_MOMENTS and time.monotonic() < self._busy_until:
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
        if fault.kind == KILL:
            return cloud.kill(self._victim(fault.target, job_id))
        actions: dict[str, Callable[[], object]] = {
            "one connection's process killed": lambda: self._servers()[0].kill_one_backend(),  # noqa: PLW0108 - SQLite has no server
            "flushed": lambda: self._servers()[1].flush(),  # noqa: PLW0108 - a folder neither
            "messages removed": lambda: remove_messages(cloud),
            "suspended past its lease": lambda: self._on_worker(job_id, suspend),
            "out of memory": lambda: self._on_worker(job_id, self._run_out_of_memory),
            "full": lambda: self._later(lambda: fill(cloud.state)),
        }
        try:
            actions[fault.kind]()
        except (psycopg.OperationalError, redis.RedisError):  # it is down for another reason; this fault comes again
            return False
        return True

    def _servers(self) -> tuple[PostgresqlServer, RedisServer]:
        assert self.cloud.postgresql is not None
        assert self.cloud.redis is not None
        return self.cloud.postgresql, self.cloud.redis

    def _victim(self, target: str, job_id: str | None) -> str:
        if target == WORKER:
            return self._worker(job_id)
        return f"device-{self._random.randrange(DEVICES)}" if target == "device" else target

    def _worker(self, job_id: str | None) -> str:
        """Name the worker that has the job; without one, either."""
        names = [WORKER, "worker-2"]
        if job_id is not None:
            owner = self.cloud.read(lambda session: session.get_one(JobRow, job_id).owner)
            for name in names:
                if owner and owner.split(":")[-2] == str(self.cloud.process_id(name)):
                    return name
        return self._random.choice(names)

    def _on_worker(self, job_id: str | None, action: Callable[[int], None]) -> None:
        pid = self.cloud.process_id(self._worker(job_id))
        self._later(lambda: action(pid))

    def _run_out_of_memory(self, pid: int) -> None:
        """Let allocations fail for a while; then kill, as the kernel does."""
        deny_memory(pid)
        self.cloud.kill_process(pid)

    def _decide(self, request: Request) -> Any:
        fault = self.plan.due(f"{request.kind} in flight", [KILL])
        if fault is not None:
            self.plan.happens(fault)
            self._later(lambda: self._strike(fault, None))
            return None
        return self.plan.tamper(request)

    def _later(self, action: Callable[[], Any]) -> None:
        def act() -> None:
            with contextlib.suppress(ProcessLookupError):  # it died of another fault
                action()

        timer = threading.Timer(self._random.uniform(0, LATEST_IN_FLIGHT_SECONDS), act)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)


def remove_messages(cloud: Cloud) -> None:
    """Lose every message of a broker that is a folder."""
    folder = queue_folder(embedded_broker_url(cloud.state))
    assert folder is not None
    for message in folder.glob("*.msg"):
        message.unlink(missing_ok=True)
