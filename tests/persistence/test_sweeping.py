"""Whose turn it is to sweep, with real connections that race."""

from datetime import timedelta

from persistence import sweeping
from persistence.clock import database_now
from tests.persistence.world import World


def take(world: World, owner: str) -> bool:
    return world.call(sweeping.take_turn, owner, 10, world.now)


def test_one_sweeps_until_it_is_silent_or_ends_its_turn(world: World) -> None:
    assert [take(world, owner) for owner in ("a", "b", "a")] == [True, False, True]
    world.wait(9)
    assert [take(world, owner) for owner in ("b", "a")] == [False, True]
    world.wait(10)
    assert [take(world, owner) for owner in ("b", "a")] == [True, False]
    world.call(sweeping.end_turn, "a", world.now)
    assert not take(world, "a"), "it was not its turn to end"
    world.call(sweeping.end_turn, "b", world.now)
    assert take(world, "a")


def test_of_many_that_start_at_once_one_sweeps(world: World) -> None:
    answers = world.race([lambda owner=owner: take(world, owner) for owner in "abcdef"])
    assert sorted(answers) == [False] * 5 + [True]
    world.wait(11)
    answers = world.race([lambda owner=owner: take(world, owner) for owner in "ghijkl"])
    assert sorted(answers) == [False] * 5 + [True]


def test_others_see_who_sweeps_and_when(world: World) -> None:
    with world.database.transaction() as session:
        assert sweeping.missing_controller(session) == "no controller sweeps, none has swept yet"
        assert sweeping.seconds_since_sweep(session) is None
        now = database_now(session)
        assert sweeping.take_turn(session, "a", 60, now)
        sweeping.record_sweep(session, now - timedelta(seconds=30))
    with world.database.reading() as session:
        assert sweeping.missing_controller(session) is None
        since = sweeping.seconds_since_sweep(session)
        assert since is not None
        assert 30 <= since < 600
    with world.database.transaction() as session:
        sweeping.end_turn(session, "a", now)
    with world.database.reading() as session:
        said = sweeping.missing_controller(session)
    assert said is not None
    assert said.startswith("no controller sweeps, the last sweep was 3")
