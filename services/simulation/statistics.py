"""What a difference between two strategies can carry: relative gains with paired nested bootstrap intervals.

Names: B draws, K cells (a seed of a base checkpoint), N rows of a set.

**The estimate.** A strategy's score is the mean over units (devices, or domains), each unit's the mean over base
checkpoints of the mean over seeds of the metric over the unit's rows. The gain is `ours / theirs - 1`, with the sign
turned for bits per byte, so that more is always better: a ratio of means, which a device near 0 cannot blow up.

**A draw.** (1) Of C base checkpoints C-1 are drawn with replacement; (2) of each drawn one's R seeds R-1, anew each
time it is drawn; (3) independently, of each set's N rows N, the same draw for every cell, model and strategy that is
measured on the set. Both strategies are scored with the same draw: pairs of the same checkpoint, seed and row stay
pairs. A level with one member is not resampled, and the interval then says nothing about other members. Units are not
resampled: the claim is about these devices.

Crossing runs with rows is the Multi-Bootstrap (Sellam et al., arXiv 2106.16163, section 3); seeds within checkpoints
are hierarchical data (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8); n-1 of n is the
rescaling of Rao and Wu (Journal of the American Statistical Association 83, 1988) without which the variance of so few
members comes out too small by (n-1)/n.

**The interval.** From the 2.5 % to the 97.5 % quantile of the draws, stretched or shrunk about the estimate to a length
of 2h; the quantiles say how much of it lies on either side. Their own distance is not used, for two reasons. Resampling
crossed levels counts the noise of single rows in single runs once for each level and once more, and is too wide (Owen,
The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007). And three seeds do not know their own spread: quantiles
of so few points are too narrow. So h is put together from the variances of draws of one level at a time, each with the
97.5 % quantile t of Student's distribution for its degrees of freedom:

    h^2 = t(N - 1)^2 V_rows + t(K - C)^2 max(0, V_seeds - V_noise) + t(C - 1)^2 max(0, V_checkpoints - W)

with V_noise what drawing cells and rows together shows beyond drawing either alone, and W the larger of V_seeds and
V_noise (a checkpoint's mean has its seeds' and its rows' noise in it). This combination is ours; the tests hold the
share of such intervals that cover the truth.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cotuning.seeding import derive_seed
from simulation.errors import MeasurementError
from simulation.run_results import Cell, Observations
from simulation.scores import Metric, Record, sign

DRAWS = 4000
LEVEL = 0.95
_ANGLES = 20_000
_NORMAL_FROM = 1000
"""Degrees of freedom from which Student's t is taken for normal: their 97.5 % quantiles differ by 0.1 %."""

Floats = NDArray[np.float64]
_Statistic = Callable[[Floats, Floats], Floats]


class Interval(Record):
    """An estimate with its interval; None where it is not defined (a baseline of 0 has no relative gain)."""

    value: float | None
    low: float | None
    high: float | None
    variance: Mapping[str, float] = {}
    """What it is made of, `rows`, `seeds` and `checkpoints`: of which more would make it narrower."""

    @property
    def above_zero(self) -> bool:
        """Whether all of it is above 0."""
        return self.low is not None and self.low > 0


class Comparison(Record):
    """One strategy against another in one metric, averaged over the units."""

    ours: str
    theirs: str
    metric: Metric
    our_score: float
    their_score: float
    relative: Interval
    """Share of their score, above 0 where ours is better."""
    difference: Interval
    """In the metric's unit, above 0 where ours is better."""
    checkpoints: int
    seeds: int
    """Seeds of the checkpoint that has the fewest."""


@dataclass(frozen=True)
class _Scores:
    """One strategy's score: the estimate, and B draws of it by what is drawn."""

    estimate: float
    draws_B: Mapping[str, Floats]


class _Draws:
    """The draws of a comparison: weights of cells [B, K] and of rows [B, N], each row of weights adding up to 1."""

    def __init__(self, observations: Observations, draws: int, seed: int) -> None:
        if draws < 100:
            raise MeasurementError(f"expected at least 100 draws, got {draws}")
        self._draws, self._seed = draws, seed
        self.cells = sorted({(each.checkpoint, each.seed) for each in observations})
        names = sorted({name for name, _ in self.cells})
        self.groups = [[place for place, (own, _) in enumerate(self.cells) if own == name] for name in names]
        self.cells_BK = {
            "all": self._draw_cells("all", self.groups, checkpoints=True),
            "checkpoints": self._draw_cells("checkpoints", self.groups, checkpoints=True, seeds=False),
            "seeds": self._draw_cells("seeds", self.groups),
            "cells": self._draw_cells("cells", [list(range(len(self.cells)))]),
        }
        self.even_K = np.zeros(len(self.cells))
        for places in self.groups:
            self.even_K[places] = 1 / len(places) / len(self.groups)
        self._rows: dict[str, Floats] = {}

    def _draw_cells(
        self, label: str, groups: Sequence[Sequence[int]], *, checkpoints: bool = False, seeds: bool = True
    ) -> Floats:
        """Weights [B, K] of drawn cells; what is not drawn counts once."""
        generator = np.random.default_rng(derive_seed(self._seed, "cells", label))
        weights_BK = np.zeros((self._draws, len(self.cells)))
        taken = max(1, len(groups) - 1) if checkpoints else len(groups)
        for turn in range(taken):
            chosen_B = generator.integers(len(groups), size=self._draws) if checkpoints else np.full(self._draws, turn)
            for index, places in enumerate(groups):
                hit_B = np.flatnonzero(chosen_B == index)
                times = max(1, len(places) - 1) if seeds else len(places)
                drawn = generator.integers(len(places), size=(len(hit_B), times)) if seeds else np.arange(times)[None]
                np.add.at(weights_BK, (hit_B[:, None], np.array(places)[drawn]), 1 / times / taken)
        return weights_BK

    def row_weights(self, name: str, num_rows: int) -> Floats:
        """Weights [B, N] of a set's rows; the same for everything that is measured on it."""
        if name not in self._rows:
            generator = np.random.default_rng(derive_seed(self._seed, "rows", name))
            counts_BN = generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=self._draws)
            self._rows[name] = counts_BN / num_rows
        return self._rows[name]


def compare(
    ours: Observations,
    theirs: Observations,
    metric: Metric,
    *,
    names: tuple[str, str] = ("ours", "theirs"),
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """The gain of one strategy over another, with its intervals.

    The order of devices, seeds and checkpoints changes nothing; that of the rows within a set, nothing but which rows a
    draw hits.

    Args:
        ours: everything measured of the one.
        theirs: the same cells and rows of the other.
        metric: which.
        names: of the two.
        draws: at least 100.
        seed: of the draws.

    Raises:
        MeasurementError: other cells or other rows; names the first that differs.
    """
    _require_pairs(ours, theirs, names)
    drawn = _Draws(ours, draws, seed)
    a, b = (_scores(each, metric, drawn) for each in (ours, theirs))
    num_rows = min(each.num_rows for each in ours.values())
    direction = sign(metric)

    def relative(x: Floats, y: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return direction * (x / y - 1)

    def difference(x: Floats, y: Floats) -> Floats:
        return direction * (x - y)

    return Comparison(
        ours=names[0],
        theirs=names[1],
        metric=metric,
        our_score=a.estimate,
        their_score=b.estimate,
        relative=_interval(relative, a, b, drawn, num_rows),
        difference=_interval(difference, a, b, drawn, num_rows),
        checkpoints=len(drawn.groups),
        seeds=min(map(len, drawn.groups)),
    )


def score_interval(observations: Observations, metric: Metric, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """One strategy's own score with its interval, cut to what the metric can be.

    Two such intervals may overlap where `compare` shows a difference.

    Raises:
        MeasurementError: nothing was measured, or units are missing in some cell.
    """
    _require_whole(observations, "the strategy")
    drawn = _Draws(observations, draws, seed)
    found = _scores(observations, metric, drawn)
    num_rows = min(each.num_rows for each in observations.values())
    whole = _interval(lambda x, _: x, found, found, drawn, num_rows)
    if whole.low is None or whole.high is None:
        return whole
    most = math.inf if metric == "bits_per_byte" else 100.0
    return whole.model_copy(update={"low": max(0.0, whole.low), "high": min(most, whole.high)})


def best_of(strategies: Mapping[str, Observations], metric: Metric) -> str:
    """The strategy with the best score, the first by name of equals.

    It is chosen by the same rows as it is compared on, and not anew in each draw: chance favours the chosen one, so a
    gain over it comes out smaller rather than larger.

    Raises:
        MeasurementError: no strategy, or one whose units are missing in some cell.
    """
    if not strategies:
        raise MeasurementError("expected at least one strategy to choose from, got none")
    scored = {name: mean_score(found, metric) for name, found in sorted(strategies.items())}
    return max(scored, key=lambda name: sign(metric) * scored[name])


def mean_score(observations: Observations, metric: Metric) -> float:
    """The estimate alone: the mean over units, of the mean over checkpoints, of the mean over seeds.

    Raises:
        MeasurementError: nothing was measured, or units are missing in some cell.
    """
    _require_whole(observations, "the strategy")
    by_checkpoint: dict[tuple[str, str], list[float]] = {}
    for cell in sorted(observations, key=_order):
        by_checkpoint.setdefault((cell.unit, cell.checkpoint), []).append(observations[cell].mean(metric))
    by_unit: dict[str, list[float]] = {}
    for (unit, _), values in by_checkpoint.items():
        by_unit.setdefault(unit, []).append(sum(values) / len(values))
    means = [sum(values) / len(values) for values in by_unit.values()]
    return sum(means) / len(means)


@cache
def student_quantile(degrees_of_freedom: int) -> float:
    """The t that a two-sided 95 % interval reaches to; at least 1 degree of freedom.

    With x = sqrt(df) tan(a) the density of t is proportional to cos(a)^(df - 1): its integral is taken by midpoints.
    """
    if degrees_of_freedom > _NORMAL_FROM:
        return NormalDist().inv_cdf(0.5 + LEVEL / 2)
    step = math.pi / 2 / _ANGLES
    middles = (np.arange(_ANGLES) + 0.5) * step
    mass = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (degrees_of_freedom - 1))])
    angle = np.interp(LEVEL, mass / mass[-1], np.arange(_ANGLES + 1) * step)
    return math.sqrt(degrees_of_freedom) * math.tan(float(angle))


def _order(cell: Cell) -> tuple[str, str, int]:
    return cell.unit, cell.checkpoint, cell.seed


def _scores(observations: Observations, metric: Metric, drawn: _Draws) -> _Scores:
    units = sorted({each.unit for each in observations})
    totals: dict[str, Floats] = {}
    for unit in units:
        own = [observations[Cell(checkpoint=name, seed=seed, unit=unit)] for name, seed in drawn.cells]
        parts = [scores.parts(metric) for scores in own]
        above_KN, below_KN = (np.stack([part[side] for part in parts]) for side in (0, 1))
        weights_BN = drawn.row_weights(own[0].rows, own[0].num_rows)
        cells_K = above_KN.sum(1) / below_KN.sum(1)
        cells_BK = (weights_BN @ above_KN.T) / (weights_BN @ below_KN.T)
        found = {"rows": cells_BK @ drawn.even_K}
        found |= {f"{label} and rows": (drawn.cells_BK[label] * cells_BK).sum(1) for label in ("all", "cells")}
        found |= {label: weights_BK @ cells_K for label, weights_BK in drawn.cells_BK.items()}
        for label, values_B in found.items():
            totals[label] = totals.get(label, 0.0) + values_B / len(units)
    return _Scores(mean_score(observations, metric), totals)


def _interval(statistic: _Statistic, a: _Scores, b: _Scores, drawn: _Draws, num_rows: int) -> Interval:
    """The interval of a statistic of two scores."""
    value = float(statistic(np.array(a.estimate), np.array(b.estimate)))
    draws_B = {label: statistic(values_B, b.draws_B[label]) for label, values_B in a.draws_B.items()}
    if not math.isfinite(value) or not all(np.isfinite(values_B).all() for values_B in draws_B.values()):
        return Interval(value=value if math.isfinite(value) else None, low=None, high=None)
    spread = {label: float(np.var(values_B)) for label, values_B in draws_B.items()}
    noise = max(0.0, spread["cells and rows"] - spread["cells"] - spread["rows"])
    parts = {
        "rows": (spread["rows"], num_rows - 1),
        "seeds": (max(0.0, spread["seeds"] - noise), len(drawn.cells) - len(drawn.groups)),
        "checkpoints": (max(0.0, spread["checkpoints"] - max(spread["seeds"], noise)), len(drawn.groups) - 1),
    }
    half = math.sqrt(sum(part * student_quantile(max(1, freedom)) ** 2 for part, freedom in parts.values()))
    low, high = (float(each) for each in np.quantile(draws_B["all and rows"], [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]))
    scale = 2 * half / (high - low) if high > low else 0.0
    return Interval(
        value=value,
        low=min(value, value - scale * (value - low)),
        high=max(value, value + scale * (high - value)),
        variance={name: part for name, (part, _) in parts.items()},
    )


def _require_whole(observations: Observations, name: str) -> None:
    """Every unit in every cell, on the same rows."""
    if not observations:
        raise MeasurementError(f"expected measurements of {name}, got none")
    cells = {(each.checkpoint, each.seed) for each in observations}
    units: dict[str, str] = {}
    for cell in sorted(observations, key=_order):
        found = observations[cell]
        if units.setdefault(cell.unit, found.digest) != found.digest:
            raise MeasurementError(f"expected {cell.unit} of {name} on the same rows in every cell, got others")
    wanted = {Cell(checkpoint=c, seed=s, unit=unit) for c, s in cells for unit in units}
    if absent := sorted(wanted - observations.keys(), key=_order):
        raise MeasurementError(f"expected {name} to be measured in every cell, got nothing for {absent[0]!r}")


def _require_pairs(ours: Observations, theirs: Observations, names: tuple[str, str]) -> None:
    for found, name in zip((ours, theirs), names, strict=True):
        _require_whole(found, name)
    if odd := sorted(ours.keys() ^ theirs.keys(), key=_order):
        raise MeasurementError(f"expected {names[0]} and {names[1]} in the same cells, got only one for {odd[0]!r}")
    for cell in sorted(ours, key=_order):
        if (ours[cell].rows, ours[cell].digest) != (theirs[cell].rows, theirs[cell].digest):
            raise MeasurementError(
                f"expected {names[0]} and {names[1]} on the same rows, got {ours[cell].rows!r} and "
                f"{theirs[cell].rows!r} for {cell!r}"
            )
