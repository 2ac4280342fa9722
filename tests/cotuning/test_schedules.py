import math

import pytest

from cotuning.schedules import share_of_rate

STEPS = 1000


def shares(schedule):
    return [share_of_rate(schedule, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 9, 10, 1000])
def test_a_share_is_never_nothing_and_never_more_than_all(schedule, steps):
    assert all(0 < share_of_rate(schedule, step, steps) <= 1 for step in range(steps))


def test_constant_and_linear_warm_up_over_a_tenth():
    assert shares("constant")[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert set(shares("constant")[99:]) == {1.0}
    assert shares("linear")[500] == pytest.approx(0.5)


def test_cosine_is_half_a_cosine_after_fifty_steps():
    assert shares("cosine")[0] == pytest.approx(1 / 50)
    assert shares("cosine")[250] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_stable_until_the_last_fifth():
    assert shares("wsd")[49] == 1.0
    assert set(shares("wsd")[50:801]) == {1.0}
    assert shares("wsd")[900] == pytest.approx(0.5)
    assert shares("wsd")[999] == pytest.approx(1 / 200)
