"""Plays runs, one or several at once, while faults happen, and looks at what is left of each."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos import invariants
from benchmarks.chaos.cloud import Cloud
from benchmarks.chaos.device import gate_path
from benchmarks.chaos.following import Follower
from benchmarks.chaos.history import Adapters, adapters, read_history
from benchmarks.chaos.invariants import Expected
from benchmarks.chaos.network import Request, SpoilingProxy
from benchmarks.chaos.plan import Plan
from benchmarks.chaos.replays import Replays
from benchmarks.chaos.scenarios import ALL_DEVICES, CHUNKED, MEMBERS, NORTH, Gate, Scenario, run_config
from benchmarks.chaos.strikes import Striker
from persistence import events, runs
from protocol.events import EventType
from protocol.runs import Run
from protocol.statuses import RunStatus

POLL_SECONDS = 0.01
LOOK_SECONDS = 0.5
"""Between two looks at a run that says nothing."""

RUN_SECONDS = 600.0
"""Of runs that are played together; a machine with much other work needs most of it."""

OVER = (RunStatus.COMPLETED, RunStatus.STOPPED)
FAILED_SECONDS = 30.0
"""A run that has failed and is not retried for so long is over."""


@dataclass
class Outcome:
    """What one run was."""

    name: str
    key: str
    rounds: int
    seconds: float
    adapters: Adapters
    violations: list[str]


def _run_name(name: str, scenario: Scenario) -> str:
    return f"{name} - {scenario.key}"


@dataclass
class _Playing:
    """A run that is being played."""

    scenario: Scenario
    follower: Follower
    run_id: str | None = None
    over: bool = False
    failed_since: float | None = None


@dataclass
class Campaign:
    """One cloud, its devices, and the runs that they play.

    Args:
        cloud: running.
        plan: the faults.
        files: the LLM's folder, the public rows and the devices' logits.
        seed: of what is left to chance.
    """

    cloud: Cloud
    plan: Plan
    files: Path
    seed: int
    proxy: SpoilingProxy = field(init=False)
    devices: dict[int, str] = field(default_factory=dict)
    """Number -> id."""

    def __post_init__(self) -> None:
        self._sequence = 0
        self._gates = self.cloud.folder / "gates"

    def __enter__(self) -> "Campaign":
        self._gates.mkdir()
        self._striker = Striker(self.cloud, self.plan, self.seed)
        self.proxy = SpoilingProxy(self.cloud.port, self._decide, self.seed).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._striker.cancel()
        self.proxy.__exit__()

    def add_devices(self) -> None:
        """Enrol the devices, in the order of their numbers, and start their agents."""
        self.cloud.ask("POST", "/v1/federations", json={"name": NORTH})
        for number in ALL_DEVICES:
            logits = self.files / f"logits-{number}.safetensors"
            federations = [name for name, members in MEMBERS.items() if number in members]
            self.devices[number] = self.cloud.add_device(
                number, self.proxy.address, logits, self._gates, federations, chunked=number in CHUNKED
            )

    def play(
        self,
        name: str,
        scenarios: Sequence[Scenario],
        *,
        references: Mapping[str, Adapters] | None = None,
        prepared: Callable[[Run], None] | None = None,
        each_round: Callable[[int], None] | None = None,
    ) -> list[Outcome]:
        """Play runs, all at once, to their end with the plan's faults, if they are wanted; say what does not hold.

        Args:
            references: by scenario's key, the adapters of a run without faults.
            prepared: called once when the first run is running, before there are devices.
            each_round: called with the number of each round of the first run that opens.
        """
        started = time.monotonic()
        self.plan.where = name
        self._sequence = self.cloud.read(events.last_sequence)
        playing = [_Playing(each, self._follower(_run_name(name, each), each)) for each in scenarios]
        with ExitStack() as stack:
            for each in playing:
                stack.enter_context(each.follower)
            creating = threading.Thread(target=self._create, args=(playing,))
            creating.start()
            self._watch(name, playing, started + RUN_SECONDS, prepared, each_round)
            creating.join()
        self._striker.rest()
        outcomes = [self._outcome(each, references or {}, time.monotonic() - started) for each in playing]
        outcomes[0].violations += self.proxy.seen.take_faults()
        found = any(outcome.violations for outcome in outcomes)
        for fault in self.plan.happened:
            if fault.where.partition(",")[0] == name:
                fault.broken = found
        return outcomes

    def replays(self) -> Replays:
        """Return what sends all signed requests of this campaign once more."""
        return Replays(self.cloud, self.proxy)

    def gate(self, name: str, scenario: Scenario, gate: Gate) -> Path:
        """Return the file that is a gate of a scenario that is played under a name."""
        return gate_path(self._gates, gate.device, _run_name(name, scenario), gate.round, gate.base)

    def _follower(self, name: str, scenario: Scenario) -> Follower:
        return Follower(self.cloud, scenario, name, self._gates, self.devices, self._striker.on_move)

    def _outcome(self, each: _Playing, references: Mapping[str, Adapters], seconds: float) -> Outcome:
        assert each.run_id is not None
        scenario = each.scenario
        history = self.cloud.read(read_history, each.run_id)
        reference = references.get(scenario.key)
        found = invariants.violations(
            history,
            Expected.of(scenario, self.devices),
            receipts=self.proxy.seen.receipts,
            reference={number: pair for number, pair in (reference or {}).items() if number <= scenario.rounds},
            blobs=self.cloud.blobs,
        )
        found += each.follower.found
        return Outcome(each.follower.name, scenario.key, scenario.rounds, seconds, adapters(history), found)

    def _watch(
        self,
        name: str,
        playing: list[_Playing],
        until: float,
        prepared: Callable[[Run], None] | None,
        each_round: Callable[[int], None] | None,
    ) -> None:
        """Strike at the moments of the plan until all runs are over."""
        told, look_at = 0, 0.0
        while time.monotonic() < until and not all(each.over for each in playing):
            new = self.cloud.read(events.list_events, run_id=None, after=self._sequence, limit=500)
            for event in new:
                self._sequence = event.sequence
                if event.type is EventType.ROUND_OPENED:
                    self.plan.where = f"{name}, round {event.data['number']}"
                self._striker.on_event(event)
                first = event.run_id == playing[0].run_id and event.type is EventType.ROUND_OPENED
                if first and each_round is not None and event.data["number"] > told:
                    told = event.data["number"]
                    each_round(told)
            self._striker.at_random()
            if new or time.monotonic() > look_at:
                look_at = time.monotonic() + LOOK_SECONDS
                for each in playing:
                    prepared = self._look(each, prepared)
            time.sleep(POLL_SECONDS)

    def _look(self, each: _Playing, prepared: Callable[[Run], None] | None) -> Callable[[Run], None] | None:
        """Note whether a run is over; a failed one, too, if nobody retries it."""
        if each.run_id is None or each.over:
            return prepared
        run = self.cloud.read(runs.get_run, each.run_id)
        if prepared is not None and run.status is RunStatus.RUNNING:
            prepared(run)
            prepared = None
        now = time.monotonic()
        each.failed_since = (each.failed_since or now) if run.status is RunStatus.FAILED else None
        each.over = run.status in OVER or (each.failed_since is not None and now > each.failed_since + FAILED_SECONDS)
        return prepared

    def _create(self, playing: list[_Playing]) -> None:
        for each in playing:
            config: dict[str, Any] = run_config(
                each.follower.name,
                self.files,
                each.scenario.rounds,
                federation=each.scenario.federation,
                **each.scenario.changes,
            )
            if each.scenario.names_devices:
                config["device_ids"] = [self.devices[number] for number in MEMBERS[each.scenario.federation]]
            each.run_id = str(self.cloud.ask("POST", "/v1/runs", json=config)["run_id"])
            each.follower.start(each.run_id)

    def _decide(self, request: Request) -> Any:
        return self._striker.on_request(request)
