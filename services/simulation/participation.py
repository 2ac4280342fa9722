"""Who takes part in a round and who drops out of it: drawn from a seed, so that every strategy meets the same fate."""

from dataclasses import dataclass
from math import ceil

import numpy as np

from cotuning.seeding import derive_seed
from simulation.errors import SetupError


@dataclass(frozen=True)
class RoundPlan:
    """One round's devices, as places in the list of devices, ascending.

    Attributes:
        chosen: receive the round's models and train.
        dropped: those of the chosen whose updates never come.
    """

    chosen: tuple[int, ...]
    dropped: tuple[int, ...]

    @property
    def delivering(self) -> tuple[int, ...]:
        """Those whose updates come."""
        return tuple(device for device in self.chosen if device not in self.dropped)


def plan_rounds(
    num_devices: int, rounds: int, *, share: float = 1.0, drop_out: float = 0.0, fewest: int = 1, seed: int
) -> list[RoundPlan]:
    """Draw every round's devices.

    A round's draw depends on `seed` and its number alone, so more rounds leave the first ones as they were.

    Args:
        num_devices: devices in all.
        rounds: at least 1.
        share: of the devices that a round chooses, rounded up; above 0, at most 1.
        drop_out: probability that a chosen device drops out, each for itself; at least 0, below 1.
        fewest: devices that deliver at least: where fewer are left, those that drop out last by their draw stay.
        seed: of the experiment.

    Raises:
        SetupError: a value out of its range.
    """
    for expected, given, holds in (
        ("num_devices of at least 1", num_devices, num_devices >= 1),
        ("rounds of at least 1", rounds, rounds >= 1),
        ("a share above 0 and at most 1", share, 0 < share <= 1),
        ("a drop_out of at least 0 and below 1", drop_out, 0 <= drop_out < 1),
        (f"fewest between 1 and the {num_devices} devices", fewest, 1 <= fewest <= num_devices),
    ):
        if not holds:
            raise SetupError(f"expected {expected}, got {given}")
    count = max(fewest, ceil(share * num_devices - 1e-9))
    plans = []
    for number in range(1, rounds + 1):
        generator = np.random.default_rng(derive_seed(seed, "participation", number))
        chosen = sorted(generator.permutation(num_devices)[:count].tolist())
        draws = dict(zip(chosen, generator.random(count).tolist(), strict=True))
        by_fate = sorted(chosen, key=lambda device: (draws[device], device))
        dropped = [device for device in by_fate if draws[device] < drop_out][: count - fewest]
        plans.append(RoundPlan(tuple(chosen), tuple(sorted(dropped))))
    return plans
