"""How the learning rate goes over the steps of a training: its share of the full rate at each."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]
WARM_UP_SHARE = 0.1
_LONGEST_WARM_UP = 50
_DECAY_SHARE = 0.2


def share_of_rate(schedule: ScheduleName, step: int, steps: int) -> float:
    """Share of the full learning rate at a step, more than 0 and at most 1.

    Args:
        schedule: `constant`: warm-up over the first tenth, then the full rate. `linear`: the same, falling towards
            none in a straight line over all steps. `cosine`: warm-up over a tenth, at most 50 steps, times half a
            cosine. `wsd` (warm-up, stable, decay; arXiv 2404.06395): warm-up as `cosine`, the full rate, and over the
            last fifth a straight fall towards none.
        step: from 0.
        steps: of the whole training.
    """
    return _SHARES[schedule](step, steps)


def _constant(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / max(1, round(steps * WARM_UP_SHARE)))


def _linear(step: int, steps: int) -> float:
    return _constant(step, steps) * (1.0 - step / steps)


def _short_warm_up(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / max(1, min(_LONGEST_WARM_UP, steps // 10)))


def _cosine(step: int, steps: int) -> float:
    return _short_warm_up(step, steps) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _wsd(step: int, steps: int) -> float:
    decay = max(1, round(steps * _DECAY_SHARE))
    return _short_warm_up(step, steps) * min(1.0, (steps - step) / decay)


_SHARES: Mapping[ScheduleName, Callable[[int, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
}
