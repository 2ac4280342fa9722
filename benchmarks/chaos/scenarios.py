"""Which runs are played: their settings, who is held back when, and what an operator does with them. All as data.

Each scenario is made so that its result does not depend on time: where a round must not close before a move, a device
of it is held back at a gate (`device.gate_path`). So the adapters of a run with faults can be compared, bit for bit,
with those of one without, in which the same moves were made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.chaos.device import HOLD, REFUSE
from protocol.federations import DEFAULT_FEDERATION
from protocol.statuses import RoundStatus, RunStatus

ROUNDS = 4
NORTH = "north"
MEMBERS: Mapping[str, tuple[int, ...]] = {DEFAULT_FEDERATION: (0, 1, 2), NORTH: (2, 3, 4)}
"""Federation -> the numbers of its devices; device 2 is in both."""

ALL_DEVICES = (0, 1, 2, 3, 4)
CHUNKED = (1, 2, 4)
"""Devices that send their files in chunks."""

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


class Move(StrEnum):
    """What an operator does with a run; the value is the last part of the path."""

    PAUSE = "pause"
    RESUME = "resume"
    RETRY = "retry"
    ROLL_BACK = "rollback"
    STOP = "stop"


@dataclass(frozen=True)
class When:
    """A moment of a run: an event's, of one attempt at a round. Round 0: of the run itself."""

    moment: str
    round: int = 0
    attempt: int = 1
    device: int | None = None
    """Number of the device whose transition it is; None: of any, or of no device."""


@dataclass(frozen=True)
class Gate:
    """Device `device` is held back (or made to refuse) in a round that starts from a version."""

    device: int
    round: int
    base: int
    what: str = HOLD


@dataclass(frozen=True)
class Step:
    """What is done once all the moments have come, in this order: gates are opened first, then the moves are made."""

    whens: tuple[When, ...]
    opens: tuple[Gate, ...] = ()
    moves: tuple[tuple[Move, dict[str, Any]], ...] = ()
    pause_seconds: float = 0.0
    """Between two moves: so long a pause lasts."""


Played = tuple[int, int, RoundStatus, int]
"""Number, attempt, status and base version of one attempt at a round."""


@dataclass(frozen=True)
class Scenario:
    """One run.

    Attributes:
        key: runs of the same key have the same result.
        counted: by round, the devices whose updates for this round it counts.
        late: by round, the devices whose updates for the round before it counts.
        played: every attempt at every round, as it must have ended; None: each once, published, one after the other.
    """

    key: str
    federation: str = DEFAULT_FEDERATION
    rounds: int = ROUNDS
    changes: Mapping[str, Any] = field(default_factory=dict)
    names_devices: bool = False
    """Whether the run is for the federation's devices by id; then it fails when they refuse."""
    gates: tuple[Gate, ...] = ()
    steps: tuple[Step, ...] = ()
    ends: RunStatus = RunStatus.COMPLETED
    late: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    on_time: tuple[int, ...] | None = None
    """Numbers of the devices whose updates are in each round in time; None: all of the federation."""
    played: tuple[Played, ...] | None = None

    @property
    def devices(self) -> tuple[int, ...]:
        """Numbers of the devices that each round counts."""
        return MEMBERS[self.federation] if self.on_time is None else self.on_time

    @property
    def attempts(self) -> tuple[Played, ...]:
        """What must have been played."""
        if self.played is not None:
            return self.played
        return tuple((number, 1, RoundStatus.PUBLISHED, number - 1) for number in range(1, self.rounds + 1))


def run_config(name: str, files: Path, rounds: int, **changes: Any) -> dict[str, Any]:
    """A run whose rounds take about a second, and always the same updates."""
    return {
        "name": name,
        "rounds": rounds,
        "llm": str(files / "llm"),
        "public_data": str(files / "public.jsonl"),
        "probe_rows": 4,
        "min_updates": len(MEMBERS[DEFAULT_FEDERATION]),
        "grace_seconds": 60.0,
        "round_deadline_seconds": 600.0,
        "proxy": {"source": "prune", "layers": 1, "steps": 2, "batch_size": 4, "max_length": 64},
        "evaluation": {
            "validation_rows": 4, "test_rows": 0, "max_new_tokens": 4, "tolerance_bits_per_byte": 100.0,
        },
        "strategy": STRATEGY,
        "seed": 7,
    } | changes  # fmt: skip


def plain(rounds: int = ROUNDS) -> Scenario:
    """Three devices, in time; nobody interferes."""
    return Scenario("plain", rounds=rounds)


def moved() -> Scenario:
    """Paused, failed and retried, rolled back twice, once while paused, and in the end stopped."""
    paused = Gate(1, 1, 0)
    refused = Gate(1, 2, 1, REFUSE)
    first, second = Gate(1, 3, 2), Gate(1, 3, 1)
    last = Gate(1, 4, 3)
    return Scenario(
        "moved",
        names_devices=True,
        gates=(paused, refused, first, second, last),
        steps=(
            Step(
                (When("assignment training", 1, device=1),),
                moves=((Move.PAUSE, {}), (Move.RESUME, {})),
                pause_seconds=0.5,
            ),
            Step((), opens=(paused,)),
            Step((When("round abandoned", 2),), opens=(refused,), moves=((Move.RETRY, {}),)),
            Step((When("assignment training", 3, device=1),), moves=((Move.ROLL_BACK, {"version": 1}),)),
            Step(
                (When("round opened", 3, 2),),
                moves=((Move.PAUSE, {}), (Move.ROLL_BACK, {"version": 0}), (Move.RESUME, {})),
                pause_seconds=0.5,
            ),
            Step((), opens=(first, second)),
            Step((When("assignment training", 4, device=1),), moves=((Move.STOP, {}),)),
            Step((), opens=(last,)),
        ),
        ends=RunStatus.STOPPED,
        played=(
            (1, 1, RoundStatus.PUBLISHED, 0),
            (2, 1, RoundStatus.ABANDONED, 1),
            (2, 2, RoundStatus.PUBLISHED, 1),
            (3, 1, RoundStatus.ABANDONED, 2),
            (3, 2, RoundStatus.ABANDONED, 1),
            (3, 3, RoundStatus.PUBLISHED, 0),
            (4, 1, RoundStatus.ABANDONED, 3),
        ),
    )


def late() -> Scenario:
    """Device 2 is late in every round; the next round uses its update with a smaller weight."""
    on_time, slow = (3, 4), 2
    numbers = range(1, ROUNDS + 1)
    gates = tuple(Gate(device, number, number - 1) for number in numbers for device in (*on_time, slow))
    steps: list[Step] = []
    for number in numbers:
        moments = [When("assignment training", number, device=slow)]
        if number > 1:
            moments.append(When("update late", number - 1, device=slow))
        steps.append(Step(tuple(moments), opens=tuple(Gate(device, number, number - 1) for device in on_time)))
        closed = When("round aggregating", number) if number < ROUNDS else When("run completed")
        steps.append(Step((closed,), opens=(Gate(slow, number, number - 1),)))
    return Scenario(
        "late",
        federation=NORTH,
        changes={"late_updates": "next_round", "min_updates": len(on_time), "grace_seconds": 0.0},
        gates=gates,
        steps=tuple(steps),
        late={number: (slow,) for number in numbers if number > 1},
        on_time=on_time,
    )
