"""Follows one run and does what its scenario says: opens gates, pauses, resumes, retries, rolls back, stops."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from benchmarks.chaos.cloud import Cloud
from benchmarks.chaos.device import gate_path
from benchmarks.chaos.plan import moment_of
from benchmarks.chaos.scenarios import Gate, Move, Scenario, Step, When
from persistence import events
from persistence.tables import AssignmentRow, RoundRow
from persistence.transitions import TAKES_UPDATES
from protocol.events import Event, EventType

LOOK_SECONDS = 0.02
Work = tuple[set[str], set[str]]
"""Ids of a run's assignments, and of its rounds that take updates."""


@dataclass
class Follower:
    """Use as a context manager around a run.

    Args:
        name: of the run, which is part of its gates' names.
        devices: number -> id.
        before_move: called with a move right before it is asked for.
    """

    cloud: Cloud
    scenario: Scenario
    name: str
    gates: Path
    devices: Mapping[int, str]
    before_move: Callable[[Move], None]
    found: list[str] = field(default_factory=list)
    """What a paused run did all the same, and moves that failed."""

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._run_id = ""
        self._sequence = 0
        self._rounds: dict[str, tuple[int, int]] = {}
        self._come: set[When] = set()
        self._thread = threading.Thread(target=self._follow, name=f"follower of {self.name}")

    def __enter__(self) -> "Follower":
        for gate in self.scenario.gates:
            self._path(gate).write_text(gate.what, encoding="ascii")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._open(self.scenario.gates)

    def start(self, run_id: str) -> None:
        """Follow this run from now on."""
        self._run_id = run_id
        self._thread.start()

    def _path(self, gate: Gate) -> Path:
        return gate_path(self.gates, gate.device, self.name, gate.round, gate.base)

    def _open(self, gates: Iterable[Gate]) -> None:
        for gate in gates:
            self._path(gate).unlink(missing_ok=True)

    def _follow(self) -> None:
        try:
            for step in self.scenario.steps:
                if not self._await(step):
                    self.found.append(f"the moments {step.whens} did not come")
                    return
                self._open(step.opens)
                self._move(step)
        except (RuntimeError, TimeoutError) as error:
            self.found.append(f"a move failed: {error}")

    def _await(self, step: Step) -> bool:
        while not self._come.issuperset(step.whens):
            if self._over.wait(LOOK_SECONDS):
                self._read()  # the last events came with the end
                return self._come.issuperset(step.whens)
            self._read()
        return True

    def _read(self) -> None:
        for event in self.cloud.read(events.list_events, run_id=self._run_id, after=self._sequence, limit=500):
            self._sequence = event.sequence
            self._note(event)

    def _note(self, event: Event) -> None:
        if event.type is EventType.ROUND_OPENED:
            self._rounds[str(event.round_id)] = (event.data["number"], event.data["attempt"])
        moment = moment_of(event)
        if moment is None:
            return
        number, attempt = self._rounds.get(str(event.round_id), (0, 1))
        self._come.add(When(moment, number, attempt))
        for device, device_id in self.devices.items():
            if device_id == event.device_id:
                self._come.add(When(moment, number, attempt, device))

    def _move(self, step: Step) -> None:
        paused: Work | None = None
        for move, body in step.moves:
            if paused is not None:
                time.sleep(step.pause_seconds)
                now = self.cloud.read(work_of, self._run_id)
                self.found += new_work(paused, now, self.name)
                paused = None
            self.before_move(move)
            self.cloud.ask("POST", f"/v1/runs/{self._run_id}/{move.value}", **({"json": body} if body else {}))
            if move is Move.PAUSE:
                paused = self.cloud.read(work_of, self._run_id)


def work_of(session: Session, run_id: str) -> Work:
    """Return what a run has given out."""
    rounds = select(RoundRow.id).where(RoundRow.run_id == run_id, RoundRow.status.in_(TAKES_UPDATES))
    assignments = select(AssignmentRow.id).where(AssignmentRow.run_id == run_id)
    return set(session.scalars(assignments)), set(session.scalars(rounds))


def new_work(before: Work, after: Work, name: str) -> list[str]:
    """Say what a run gave out, opened or closed between two looks while it was paused."""
    found = [f"{name} was paused and gave out assignment {each}" for each in sorted(after[0] - before[0])]
    found += [f"{name} was paused and opened round {each}" for each in sorted(after[1] - before[1])]
    return found + [f"{name} was paused and closed round {each}" for each in sorted(before[1] - after[1])]
