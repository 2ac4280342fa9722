"""The gate of norms: against a slow formula, at its edges, and by what must always hold."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotuning.norm_gate import unusual_norms

NORMS = st.lists(st.floats(0, 1e6), min_size=1, max_size=12)


def found(norms: list[float], most_deviations: float = 6.0, min_updates: int = 3) -> set[int]:
    keyed = {str(number): norm for number, norm in enumerate(norms)}
    return {int(key) for key in unusual_norms(keyed, most_deviations=most_deviations, min_updates=min_updates)}


def slow_median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


@given(norms=NORMS, most_deviations=st.floats(1, 20))
def test_as_the_formula_says(norms: list[float], most_deviations: float) -> None:
    middle = slow_median(norms)
    mad = slow_median([abs(norm - middle) for norm in norms])
    most = most_deviations * max(1.4826 * mad, 0.05 * middle)
    expected = {number for number, norm in enumerate(norms) if abs(norm - middle) > most} if len(norms) >= 3 else set()
    assert found(norms, most_deviations) == expected


@given(norms=NORMS, most_deviations=st.floats(1, 20))
def test_at_least_half_are_usual(norms: list[float], most_deviations: float) -> None:
    assert len(found(norms, most_deviations)) <= len(norms) / 2


@given(norms=st.lists(st.floats(1, 100), min_size=3, max_size=9), exponent=st.integers(-10, 10))
def test_the_unit_does_not_matter(norms: list[float], exponent: int) -> None:
    assert found([math.ldexp(norm, exponent) for norm in norms]) == found(norms)


def test_a_case_by_hand() -> None:
    # Median 1.1; deviations 0.2, 0, 0.1, 0, 38.9: MAD 0.1; 6 * 0.148 = 0.89.
    norms = {"a": 0.9, "b": 1.1, "c": 1.0, "d": 1.1, "e": 40.0}
    ((key, reason),) = unusual_norms(norms, most_deviations=6.0, min_updates=5).items()
    assert key == "e"
    assert reason == "expected a norm within 0.89 of the median 1.1 of the round's 5 updates, got 40"
    assert unusual_norms(norms, most_deviations=6.0, min_updates=6) == {}
    assert unusual_norms({}, most_deviations=6.0, min_updates=3) == {}


@pytest.mark.parametrize(("last", "expected"), [(1.25, set()), (1.35, {4}), (0.75, set()), (0.65, {4})])
def test_equal_norms_leave_room_for_a_few_per_cent(last: float, expected: set[int]) -> None:
    assert found([1.0, 1.0, 1.0, 1.0, last]) == expected
