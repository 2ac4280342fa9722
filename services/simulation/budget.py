"""What a run cost: optimizer steps, processor and wall-clock seconds, peak memory, and bytes that crossed the network.

Steps are the budget that strategies are given; the rest is measured, so that a gain can be held against its price.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from assets.process_memory import forget_peak, peak_memory
from simulation.errors import MeasurementError, UndeclaredTraffic
from simulation.scores import Record

Direction = Literal["up", "down"]
"""`up`: from a device; `down`: to one."""

PREPARATION = 0
"""The round that what is sent once, before the first round, is counted under."""


class RoundTraffic(Record):
    """What crossed the network in a round, all devices together."""

    round: int = Field(ge=0)
    devices: int = Field(ge=0, description="Devices that took part, those that dropped out later too.")
    up: Mapping[str, int] = Field(default={}, description="Kind -> bytes.")
    down: Mapping[str, int] = {}

    @property
    def num_bytes(self) -> int:
        """All kinds, both directions."""
        return sum(self.up.values()) + sum(self.down.values())


class Cost(Record):
    """What one run cost."""

    steps: Mapping[str, int] = Field(default={}, description="Model -> optimizer steps.")
    wall_seconds: Mapping[str, float] = Field(default={}, description="By stage.")
    cpu_seconds: Mapping[str, float] = Field(default={}, description="By stage: of all threads of the process.")
    peak_memory_bytes: Mapping[str, int] = Field(default={}, description="By stage: largest resident size.")
    peak_by_stage: bool = Field(
        default=True,
        description="False where the system does not let a peak be forgotten: then each counts from start.",
    )
    traffic: tuple[RoundTraffic, ...] = ()

    def num_bytes(self, direction: Direction) -> dict[str, int]:
        """Kind -> bytes of all rounds."""
        totals: dict[str, int] = {}
        for each in self.traffic:
            for kind, count in getattr(each, direction).items():
                totals[kind] = totals.get(kind, 0) + count
        return totals

    def bytes_per_device_and_round(self, *, with_preparation: bool) -> float | None:
        """Mean bytes, up and down, of one device in one round; None without a round in which a device took part.

        Args:
            with_preparation: spread what was sent once, before the first round, over the rounds.
        """
        turns = sum(each.devices for each in self.traffic if each.round != PREPARATION)
        counted = [each for each in self.traffic if with_preparation or each.round != PREPARATION]
        return sum(each.num_bytes for each in counted) / turns if turns else None


@dataclass(frozen=True)
class Crossing:
    """The kinds that a strategy declares to cross the network."""

    up: frozenset[str] = frozenset()
    down: frozenset[str] = frozenset()


@dataclass
class Meter:
    """Counts what a run costs while it is played.

    Attributes:
        declared: what may cross the network.
        cpu_clock: processor seconds from some start.
        wall_clock: seconds from some start.
    """

    declared: Crossing
    cpu_clock: Callable[[], float] = time.process_time
    wall_clock: Callable[[], float] = time.perf_counter
    _stage: str | None = None
    _steps: dict[str, int] = field(default_factory=dict)
    _wall: dict[str, float] = field(default_factory=dict)
    _cpu: dict[str, float] = field(default_factory=dict)
    _peak: dict[str, int] = field(default_factory=dict)
    _by_stage: bool = True
    _devices: dict[int, set[str]] = field(default_factory=dict)
    _bytes: dict[tuple[int, Direction, str], int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's seconds and peak memory under `name`; a name may come again.

        Raises:
            MeasurementError: another stage is being measured: the seconds of one would count twice.
        """
        if self._stage is not None:
            raise MeasurementError(f"expected stages one after the other, got {name!r} within {self._stage!r}")
        self._stage = name
        self._by_stage = forget_peak() and self._by_stage
        cpu, wall = self.cpu_clock(), self.wall_clock()
        try:
            yield
        finally:
            self._cpu[name] = self._cpu.get(name, 0.0) + self.cpu_clock() - cpu
            self._wall[name] = self._wall.get(name, 0.0) + self.wall_clock() - wall
            self._peak[name] = max(self._peak.get(name, 0), peak_memory())
            self._stage = None

    def count_steps(self, model: str, steps: int) -> None:
        """Add optimizer steps of a model: a device's name, `llm` or `proxy`."""
        if steps < 0:
            raise MeasurementError(f"expected steps of at least 0, got {steps} of {model}")
        self._steps[model] = self._steps.get(model, 0) + steps

    def take_part(self, round_number: int, devices: Iterable[str]) -> None:
        """Note who takes part in a round, whether or not anything is sent."""
        self._devices.setdefault(round_number, set()).update(devices)

    def count_bytes(self, round_number: int, device: str, direction: Direction, kind: str, num_bytes: int) -> None:
        """Add what was really produced for or by a device: the length of the file, as it would travel.

        Raises:
            UndeclaredTraffic: the strategy does not declare that kind in that direction.
            MeasurementError: a negative number.
        """
        allowed = getattr(self.declared, direction)
        if kind not in allowed:
            raise UndeclaredTraffic(
                f"expected what travels {direction} to be of the declared kinds "
                f"({', '.join(sorted(allowed)) or 'none'}), got {kind!r} of {device}"
            )
        if num_bytes < 0:
            raise MeasurementError(f"expected at least 0 bytes, got {num_bytes} of {kind!r}")
        self.take_part(round_number, [device])
        place = (round_number, direction, kind)
        self._bytes[place] = self._bytes.get(place, 0) + num_bytes

    def cost(self) -> Cost:
        """What was counted so far."""
        return Cost(
            steps=dict(self._steps),
            wall_seconds=dict(self._wall),
            cpu_seconds=dict(self._cpu),
            peak_memory_bytes=dict(self._peak),
            peak_by_stage=self._by_stage,
            traffic=tuple(
                RoundTraffic(
                    round=number,
                    devices=len(self._devices[number]),
                    up=self._sent(number, "up"),
                    down=self._sent(number, "down"),
                )
                for number in sorted(self._devices)
            ),
        )

    def _sent(self, number: int, direction: Direction) -> dict[str, int]:
        return {
            kind: count for (at, way, kind), count in sorted(self._bytes.items()) if at == number and way == direction
        }


def equal_cpu_steps(*, method_cpu_seconds: float, standalone_cpu_seconds: float, standalone_steps: int) -> int:
    """Steps that standalone training can take in the processor time of a method: the control of equal cost.

    Args:
        method_cpu_seconds: of the device's part of the method: all that trains on the device.
        standalone_cpu_seconds: measured over `standalone_steps` on the same machine, same model and batches.
        standalone_steps: at least 1.

    Returns:
        The nearest whole number, at least 1.

    Raises:
        MeasurementError: a value that is not above 0.
    """
    given = {
        "method_cpu_seconds": method_cpu_seconds,
        "standalone_cpu_seconds": standalone_cpu_seconds,
        "standalone_steps": standalone_steps,
    }
    if wrong := {name: value for name, value in given.items() if not value > 0}:
        raise MeasurementError(f"expected values above 0, got {wrong}")
    return max(1, round(method_cpu_seconds / standalone_cpu_seconds * standalone_steps))
