"""Gains and their intervals: by hand, by simulation, and what must not matter."""

import math

import numpy as np
import pytest

from simulation.errors import MeasurementError
from simulation.run_results import Cell
from simulation.statistics import best_of, compare, mean_score, score_interval, student_quantile
from tests.simulation.observations import observed, scores_of


def made_up(generator: np.random.Generator, units: int, cells: int, rows: int, mean: float) -> np.ndarray:
    return np.clip(mean + generator.normal(0, 9, (units, cells, rows)), 0, 100)


def test_the_estimate_by_hand() -> None:
    # Device a: rows (20, 40) and (40, 60) with two seeds: 30 and 50, so 40. Device b: 80 and 60, so 70. Mean 55.
    # The other: a 20 and 30, so 25; b 50 and 60, so 55. Mean 40. Gain 55 / 40 - 1 = 0.375, not the mean of the devices'
    # own gains (40 / 25 - 1 and 70 / 55 - 1, mean 0.436).
    ours = observed(np.array([[[20, 40], [40, 60]], [[80, 80], [60, 60]]], dtype=float), ["a", "b"])
    theirs = observed(np.array([[[20, 20], [30, 30]], [[40, 60], [50, 70]]], dtype=float), ["a", "b"])
    found = compare(ours, theirs, "rouge_l", names=("new", "old"))
    assert (found.ours, found.theirs) == ("new", "old")
    assert (found.our_score, found.their_score) == (55.0, 40.0)
    assert found.relative.value == pytest.approx(0.375)
    assert found.difference.value == pytest.approx(15.0)
    assert (found.checkpoints, found.seeds) == (1, 2)


def test_a_checkpoint_with_more_seeds_weighs_no_more() -> None:
    rows = {("one", 0): 10.0, ("one", 1): 30.0, ("two", 0): 80.0}
    found = {Cell(checkpoint=c, seed=s, unit="a"): scores_of([value]) for (c, s), value in rows.items()}
    assert mean_score(found, "rouge_l") == (20 + 80) / 2


def test_fewer_bits_are_a_gain() -> None:
    # Bits per byte of `scores_of` are 2 - score / 100: 1.5 against 1.6.
    found = compare(observed(np.full((1, 1, 4), 50.0)), observed(np.full((1, 1, 4), 40.0)), "bits_per_byte")
    assert found.relative.value == pytest.approx(0.1 / 1.6)
    assert found.difference.value == pytest.approx(0.1)


def test_the_variance_of_rows_by_hand() -> None:
    # One run, differences 0 and 10: a draw has mean 0, 5, 5 or 10, so the variance is 12.5 whatever else is paired.
    base = np.array([[[10.0, 60.0]]])
    found = compare(observed(base + np.array([0, 10])), observed(base), "rouge_l", draws=40_000)
    assert found.difference.variance["rows"] == pytest.approx(12.5, rel=0.03)
    assert found.difference.variance["seeds"] == found.difference.variance["checkpoints"] == 0
    half = student_quantile(1) * math.sqrt(12.5)
    assert found.difference.high - found.difference.low == pytest.approx(2 * half, rel=0.02)
    assert found.difference.low == pytest.approx(5 - half, rel=0.05)


def test_the_variance_of_seeds_by_hand() -> None:
    # Three seeds whose differences are 1, 2 and 6 on every row: variance of the mean s^2 / 3 = 7 / 3, with 2 degrees.
    base = np.full((1, 3, 50), 40.0)
    found = compare(observed(base + np.array([1, 2, 6])[None, :, None]), observed(base), "rouge_l", draws=40_000)
    assert found.difference.value == pytest.approx(3.0)
    assert found.difference.variance["seeds"] == pytest.approx(7 / 3, rel=0.03)
    assert found.difference.variance["rows"] == pytest.approx(0, abs=1e-9)
    length = found.difference.high - found.difference.low
    assert length == pytest.approx(2 * 4.302653 * math.sqrt(7 / 3), rel=0.02)


def test_the_variance_of_checkpoints_by_hand() -> None:
    # Three checkpoints of two equal seeds each, differences 0, 3 and 9: s^2 / 3 = 21 / 3.
    values = np.array([0, 3, 9, 0, 3, 9], dtype=float)[None, :, None] + np.full((1, 6, 20), 40.0)
    found = compare(
        observed(values, checkpoints=3), observed(np.full((1, 6, 20), 40.0), checkpoints=3), "rouge_l", draws=40_000
    )
    assert (found.checkpoints, found.seeds) == (3, 2)
    assert found.difference.variance["checkpoints"] == pytest.approx(7.0, rel=0.03)
    assert found.difference.variance["seeds"] == pytest.approx(0, abs=1e-9)


def test_pairing_takes_out_what_both_have() -> None:
    generator = np.random.default_rng(0)
    base = made_up(generator, 1, 3, 60, 40.0)
    found = compare(observed(base + 1.0), observed(base), "rouge_l")
    assert found.difference.low == pytest.approx(1.0, abs=1e-6)
    assert found.difference.high == pytest.approx(1.0, abs=1e-6)
    alone = score_interval(observed(base), "rouge_l")
    assert alone.high - alone.low > 2


def test_a_scores_interval_stays_within_what_it_can_be() -> None:
    rare = np.full((1, 1, 30), 10.0)
    rare[0, 0, 0] = 60.0
    found = score_interval(observed(rare), "exact_match")
    assert found.value == pytest.approx(100 / 30)
    assert found.low == 0.0
    often = score_interval(observed(70.0 - rare), "exact_match")
    assert often.high == 100.0


@pytest.mark.parametrize("metric", ["rouge_l", "exact_match", "bits_per_byte"])
def test_no_difference_gives_an_interval_around_zero(metric: str) -> None:
    base = made_up(np.random.default_rng(1), 2, 3, 40, 50.0)
    same = compare(observed(base, ["a", "b"]), observed(base, ["a", "b"]), metric)  # type: ignore[arg-type]
    for each in (same.relative, same.difference):
        assert (each.value, each.low, each.high, each.above_zero) == (0.0, 0.0, 0.0, False)
    other = made_up(np.random.default_rng(2), 2, 3, 40, 50.0)
    found = compare(observed(base, ["a", "b"]), observed(other, ["a", "b"]), metric)  # type: ignore[arg-type]
    assert found.relative.low < 0 < found.relative.high
    assert found.difference.low < 0 < found.difference.high


def test_the_order_of_devices_seeds_and_checkpoints_does_not_matter() -> None:
    generator = np.random.default_rng(3)
    a, b = (observed(made_up(generator, 3, 6, 20, mean), ["a", "b", "c"], checkpoints=2) for mean in (45.0, 40.0))
    found = compare(a, b, "rouge_l")
    turned = compare(dict(reversed(a.items())), dict(sorted(b.items(), key=lambda pair: pair[0].seed)), "rouge_l")
    assert turned == found


def test_the_order_of_rows_changes_no_more_than_other_draws_do() -> None:
    generator = np.random.default_rng(4)
    a, b = (made_up(generator, 1, 3, 50, mean) for mean in (45.0, 40.0))
    order = generator.permutation(50)
    found = compare(observed(a), observed(b), "rouge_l")
    turned = compare(observed(a[:, :, order]), observed(b[:, :, order]), "rouge_l")
    assert turned.difference.value == pytest.approx(found.difference.value)
    assert turned.difference.low == pytest.approx(found.difference.low, abs=0.25)
    assert turned.difference.high == pytest.approx(found.difference.high, abs=0.25)
    assert compare(observed(a), observed(b), "rouge_l", seed=1).relative != found.relative
    assert compare(observed(a), observed(b), "rouge_l") == found


def test_devices_on_the_same_rows_are_drawn_together() -> None:
    # Two devices with the same differences row by row: together they know no more than one.
    base, better = np.full((1, 1, 30), 40.0), np.full((1, 1, 30), 40.0) + np.arange(30)
    one = compare(observed(better), observed(base), "rouge_l").difference
    shared = {
        side: {
            Cell(checkpoint="0", seed=0, unit=unit): scores_of(values[0, 0].tolist(), rows="both")
            for unit in ("a", "b")
        }
        for side, values in (("ours", better), ("theirs", base))
    }
    both = compare(shared["ours"], shared["theirs"], "rouge_l").difference
    assert both.variance["rows"] == pytest.approx(one.variance["rows"], rel=0.1)
    apart = compare(observed(np.repeat(better, 2, 0), "ab"), observed(np.repeat(base, 2, 0), "ab"), "rouge_l")
    assert apart.difference.variance["rows"] == pytest.approx(one.variance["rows"] / 2, rel=0.1)


def covered_share(checkpoints: int, seeds: int, run_sd: float, noise: float, *, trials: int) -> float:
    """How often the interval of a true relative gain of 10 % covers it.

    Rows differ by 8 (the same for both strategies), checkpoints and seeds by `run_sd` and single answers by `noise`.
    """
    generator = np.random.default_rng(0)
    cells, rows = checkpoints * seeds, 60
    covered = 0
    for _ in range(trials):
        difficulty = generator.normal(0, 8, (1, 1, rows))
        sides = []
        for mean in (44.0, 40.0):
            own = np.tile(generator.normal(0, run_sd if checkpoints > 1 else 0.0, checkpoints), seeds)
            own = own + generator.normal(0, run_sd, cells)
            values = mean + own[None, :, None] + difficulty + generator.normal(0, noise, (1, cells, rows))
            sides.append(observed(np.clip(values, 0, 100), checkpoints=checkpoints))
        seed = int(generator.integers(2**31))
        found = compare(sides[0], sides[1], "rouge_l", draws=400, seed=seed).relative
        covered += found.low <= 0.1 <= found.high
    return covered / trials


@pytest.mark.parametrize(
    ("checkpoints", "seeds", "run_sd", "noise", "low", "high"),
    [
        # Nothing but rows: as often as it says.
        (1, 1, 0.0, 6.0, 0.92, 0.98),
        # The noise of single answers outweighs the rest: counted once, not once a level.
        (1, 3, 0.3, 6.0, 0.92, 0.99),
        # Runs outweigh rows, and there are few of them.
        (1, 5, 2.0, 3.0, 0.90, 0.98),
        (1, 3, 2.0, 3.0, 0.89, 0.98),
        (3, 1, 1.5, 3.0, 0.89, 0.98),
        (3, 3, 1.0, 3.0, 0.90, 0.98),
    ],
)
def test_it_covers_the_truth_about_as_often_as_it_says(
    checkpoints: int, seeds: int, run_sd: float, noise: float, low: float, high: float
) -> None:
    assert low < covered_share(checkpoints, seeds, run_sd, noise, trials=300) < high


def test_a_baseline_of_zero_has_a_difference_and_no_relative_gain() -> None:
    ours, theirs = observed(np.array([[[60.0, 10.0, 90.0]]])), observed(np.array([[[40.0, 10.0, 30.0]]]))
    found = compare(ours, theirs, "exact_match")
    assert (found.relative.value, found.relative.low, found.relative.high) == (None, None, None)
    assert found.difference.value == pytest.approx(200 / 3)
    assert not found.relative.above_zero
    # One exact answer of three: draws without it have no ratio either.
    once = compare(ours, observed(np.array([[[60.0, 10.0, 30.0]]])), "exact_match")
    assert (once.relative.value, once.relative.low) == (pytest.approx(1.0), None)


def test_the_best_strategy_by_metric() -> None:
    strategies = {
        "good": observed(np.full((1, 1, 4), 60.0)),
        "bad": observed(np.full((1, 1, 4), 20.0)),
        "alike": observed(np.full((1, 1, 4), 60.0)),
    }
    assert best_of(strategies, "rouge_l") == "alike"
    assert best_of({name: strategies[name] for name in ("bad", "good")}, "bits_per_byte") == "good"
    with pytest.raises(MeasurementError, match="at least one strategy to choose from"):
        best_of({}, "rouge_l")


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227)])
def test_students_quantiles_are_those_of_the_tables(degrees: int, expected: float) -> None:
    assert student_quantile(degrees) == pytest.approx(expected, rel=1e-4)
    assert student_quantile(5000) == pytest.approx(1.959964, rel=1e-6)


def test_what_cannot_be_paired_is_refused() -> None:
    whole = observed(np.full((2, 3, 4), 50.0), ["a", "b"])
    cell = Cell(checkpoint="0", seed=1, unit="b")
    part = {each: scores for each, scores in whole.items() if each != cell}
    with pytest.raises(
        MeasurementError, match=r"expected theirs to be measured in every cell, got nothing for .*seed=1"
    ):
        compare(whole, part, "rouge_l")
    fewer = {each: scores for each, scores in whole.items() if each.seed < 2}
    with pytest.raises(MeasurementError, match=r"in the same cells, got only one for .*seed=2"):
        compare(whole, fewer, "rouge_l")
    other_rows = {each: scores_of([50.0] * 4, rows="other") for each in whole}
    with pytest.raises(MeasurementError, match="on the same rows, got 'a' and 'other'"):
        compare(whole, other_rows, "rouge_l")
    changing = whole | {cell: scores_of([50.0] * 5, rows="b")}
    with pytest.raises(MeasurementError, match="expected b of ours on the same rows in every cell"):
        compare(changing, whole, "rouge_l")
    with pytest.raises(MeasurementError, match="got none"):
        compare({}, whole, "rouge_l")
    with pytest.raises(MeasurementError, match="at least 100 draws, got 10"):
        compare(whole, whole, "rouge_l", draws=10)
