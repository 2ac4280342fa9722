"""The discount of stale updates, against FedAsync's formula and its properties."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotuning.staleness import staleness_discount


def test_by_hand() -> None:
    assert staleness_discount(0, 0.5) == 1.0
    assert staleness_discount(3, 0.5) == 0.5
    assert staleness_discount(1, 1.0) == 0.5
    assert staleness_discount(7, 0.0) == 1.0


@given(versions=st.integers(0, 1000), exponent=st.floats(0, 50))
def test_it_is_a_share_that_falls_with_age(versions: int, exponent: float) -> None:
    discount = staleness_discount(versions, exponent)
    assert 0 < discount <= 1
    assert staleness_discount(versions + 1, exponent) <= discount
    assert math.isclose(discount, math.exp(-exponent * math.log1p(versions)), rel_tol=1e-9)


def test_what_is_not_an_age_is_refused() -> None:
    for versions, exponent in ((-1, 0.5), (1, -0.5)):
        with pytest.raises(ValueError, match="expected versions >= 0"):
            staleness_discount(versions, exponent)
