"""The interval of a difference, against a simulation and against cases worked by hand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from command_line.significance import difference


def test_worked_by_hand() -> None:
    # 6 and 9 right of 18 rows: shares (6+1)/20 = 0.35 and (9+1)/20 = 0.5; the error of their difference is
    # sqrt(0.35*0.65/20 + 0.5*0.5/20) = sqrt(0.011375 + 0.0125) = 0.154515; 0.15 -+ 1.959964*0.154515.
    found = difference(100 * 6 / 18, 50.0, 18)
    assert found.points == pytest.approx(100 * 3 / 18)
    assert found.low == pytest.approx(15 - 30.284, abs=0.01)
    assert found.high == pytest.approx(15 + 30.284, abs=0.01)
    assert not found.shown


def test_a_large_difference_on_many_rows_is_shown() -> None:
    assert difference(30, 60, 200).shown
    assert difference(60, 30, 200).shown
    assert not difference(50, 53, 200).shown


def test_equal_scores_at_the_edge_have_a_width() -> None:
    found = difference(0, 0, 10)
    assert found.low < 0 < found.high


@given(st.integers(0, 50), st.integers(0, 50), st.integers(50, 300))
def test_swapping_the_two_turns_the_interval_round(first: int, second: int, rows: int) -> None:
    there, back = difference(100 * first / rows, 100 * second / rows, rows), None
    back = difference(100 * second / rows, 100 * first / rows, rows)
    assert there.low == pytest.approx(-back.high)
    assert there.high == pytest.approx(-back.low)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = random.Random(0)
    rows, shares, trials = 60, (0.3, 0.45), 2000
    covered = 0
    for _ in range(trials):
        right = [sum(generator.random() < share for _ in range(rows)) for share in shares]
        found = difference(100 * right[0] / rows, 100 * right[1] / rows, rows)
        covered += found.low <= 100 * (shares[1] - shares[0]) <= found.high
    assert 0.935 < covered / trials < 0.975
