"""What a device is given after its run's last round: once the run is completed, and to nobody else."""

import pytest

from persistence import last_steps, run_moves, runs
from protocol.errors import DomainError, ErrorCode
from tests.persistence.world import World, sha


def refused(world: World, device_id: str, assignment_id: str) -> ErrorCode:
    with pytest.raises(DomainError) as caught:
        world.call(last_steps.last_step, device_id, assignment_id)
    return caught.value.code


def test_it_comes_when_the_run_is_completed_with_its_last_message(world: World) -> None:
    device, other = world.enrol_many("a", "b")
    run = world.start_run("fedmkt", rounds=1, device_ids=[device, other])
    idle = world.take(other)
    delivered = world.deliver(device)
    assert world.call(last_steps.last_step, device, delivered.assignment_id) is None
    assert refused(world, other, idle.assignment_id) is ErrorCode.ILLEGAL_TRANSITION  # it has delivered nothing
    assert refused(world, other, delivered.assignment_id) is ErrorCode.ASSIGNMENT_NOT_FOUND
    world.deliver(other)
    world.finish_round()
    given = world.call(last_steps.last_step, device, delivered.assignment_id)
    assert given is not None
    assert (given.run_id, given.round_number, given.base_version) == (run.run_id, 2, 1)
    assert given.message is not None
    assert given.message.sha256 == sha("message 1")
    assert (given.uploads, given.upload_limits, given.evaluate_after) == ([], {}, False)
    assert given.strategy == delivered.strategy


def test_it_is_of_the_version_that_the_run_ended_with(world: World) -> None:
    device = world.enrol("a")
    world.start_run("fedmkt", rounds=2)
    world.deliver(device)
    world.finish_round()
    delivered = world.deliver(device)
    world.finish_round(promoted=False)
    given = world.call(last_steps.last_step, device, delivered.assignment_id)
    assert given is not None
    assert given.message is not None
    assert (given.base_version, given.message.sha256) == (1, sha("message 1"))


@pytest.mark.parametrize("end", ["paused", "stopped"])
def test_a_run_that_is_held_may_come_to_it_and_one_that_was_stopped_may_not(world: World, end: str) -> None:
    devices = world.enrol_many("a", "b")
    run = world.start_run("fedmkt", rounds=1, device_ids=devices, min_updates=2)
    delivered = world.deliver(devices[0])
    if end == "paused":
        world.call(run_moves.pause_run, run.run_id, "wait", world.now)
        assert world.call(last_steps.last_step, devices[0], delivered.assignment_id) is None
    else:
        world.call(runs.stop_run, run.run_id, "enough", world.now)
        assert refused(world, devices[0], delivered.assignment_id) is ErrorCode.ILLEGAL_TRANSITION


def test_a_strategy_without_it_gives_none(world: World) -> None:
    device = world.enrol("a")
    world.start_run("feature_based", rounds=1)
    delivered = world.deliver(device)
    assert refused(world, device, delivered.assignment_id) is ErrorCode.ILLEGAL_TRANSITION
    world.finish_round()
    assert refused(world, device, delivered.assignment_id) is ErrorCode.ILLEGAL_TRANSITION
