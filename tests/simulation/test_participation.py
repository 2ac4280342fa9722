import pytest

from simulation.errors import SetupError
from simulation.participation import plan_rounds


def test_everybody_takes_part_unless_told_otherwise() -> None:
    plans = plan_rounds(3, 2, seed=0)
    assert [(each.chosen, each.dropped, each.delivering) for each in plans] == [((0, 1, 2), (), (0, 1, 2))] * 2


def test_a_share_is_rounded_up_and_changes_from_round_to_round() -> None:
    plans = plan_rounds(10, 30, share=0.25, seed=1)
    assert {len(each.chosen) for each in plans} == {3}
    assert len({each.chosen for each in plans}) > 10
    assert {device for each in plans for device in each.chosen} == set(range(10))
    assert len(plan_rounds(10, 1, share=0.3, seed=1)[0].chosen) == 3


def test_more_rounds_leave_the_first_ones_as_they_were() -> None:
    how = {"share": 0.5, "drop_out": 0.4, "seed": 7}
    assert plan_rounds(8, 20, **how)[:5] == plan_rounds(8, 5, **how)
    assert plan_rounds(8, 5, **how) != plan_rounds(8, 5, share=0.5, drop_out=0.4, seed=8)


def test_as_many_drop_out_as_the_probability_says_and_enough_stay() -> None:
    plans = plan_rounds(10, 400, drop_out=0.3, seed=0)
    share = sum(len(each.dropped) for each in plans) / 4000
    assert 0.27 < share < 0.33
    for each in plan_rounds(4, 200, drop_out=0.95, fewest=2, seed=0):
        assert len(each.delivering) >= 2
        assert set(each.dropped) | set(each.delivering) == set(each.chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_devices": 0}, "num_devices of at least 1, got 0"),
        ({"rounds": 0}, "rounds of at least 1, got 0"),
        ({"share": 0.0}, "a share above 0 and at most 1, got 0.0"),
        ({"drop_out": 1.0}, "a drop_out of at least 0 and below 1, got 1.0"),
        ({"fewest": 4}, "fewest between 1 and the 3 devices, got 4"),
    ],
    ids=["devices", "rounds", "share", "drop_out", "fewest"],
)
def test_values_out_of_range_are_refused(change: dict, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        plan_rounds(**({"num_devices": 3, "rounds": 2, "seed": 0} | change))
