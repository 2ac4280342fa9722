"""Federations: who belongs where, who gets whose work, and that no run keeps a device from another."""

import pytest

from persistence import devices, enrolment, federations, run_moves, runs
from persistence.tables import FederationDeviceRow
from protocol.devices import EnrolmentRequest, EnrolmentTokenCreate
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.federations import FederationChange, FederationCreate
from protocol.statuses import RoundStatus, RunStatus
from tests.persistence.world import PROFILE, World


def found(world: World, name: str) -> None:
    world.call(federations.create_federation, FederationCreate(name=name, description=f"all of {name}"), world.now)


def enrol_into(world: World, name: str, *names: str) -> str:
    world.wait(1)
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(federations=list(names)), world.now)
    request = EnrolmentRequest(token=token.token, name=name, profile=PROFILE)
    return world.call(enrolment.enrol, request, world.now).device_id


def code_of(world: World, function: object, *arguments: object) -> ErrorCode:
    before = world.snapshot()
    with pytest.raises(DomainError) as caught:
        world.call(function, *arguments)  # type: ignore[arg-type]
    assert world.snapshot() == before
    return caught.value.code


def test_whoever_names_none_belongs_to_the_default_one(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    assert world.call(devices.get_device, device).federations == ["default"]
    assert run.federation == "default"
    assert world.take(device).run_id == run.run_id
    shown = world.call(federations.get_federation, "default")
    assert (shown.num_devices, shown.num_runs) == (1, 1)


def test_a_federation_is_created_listed_changed_and_deleted(world: World) -> None:
    for name in ("south", "north", "east"):
        found(world, name)
    assert code_of(world, federations.create_federation, FederationCreate(name="north"), world.now) is (
        ErrorCode.NAME_TAKEN
    )
    first = world.call(federations.list_federations, limit=3)
    assert [each.name for each in first.items] == ["default", "east", "north"]
    rest = world.call(federations.list_federations, limit=3, cursor=first.next_cursor)
    assert ([each.name for each in rest.items], rest.next_cursor) == (["south"], None)
    changed = world.call(federations.change_federation, "north", FederationChange(description="cold"))
    assert changed.description == "cold"
    enrol_into(world, "a", "north", "south")
    world.call(federations.delete_federation, "north", world.now)
    assert code_of(world, federations.get_federation, "north") is ErrorCode.FEDERATION_NOT_FOUND
    assert world.count(FederationDeviceRow) == 1
    told = [event.type for event in world.events() if event.data.get("federation") == "north"]
    assert told == [EventType.FEDERATION_CREATED, EventType.FEDERATION_DELETED]


def test_what_may_not_be_deleted_or_named(world: World) -> None:
    found(world, "north")
    world.create_run(federation="north")
    assert code_of(world, federations.delete_federation, "north", world.now) is ErrorCode.CONFLICT
    assert code_of(world, federations.delete_federation, "default", world.now) is ErrorCode.CONFLICT
    found(world, "south")
    world.call(enrolment.create_token, EnrolmentTokenCreate(federations=["south"]), world.now)
    assert code_of(world, federations.delete_federation, "south", world.now) is ErrorCode.CONFLICT
    world.wait(86_400)  # the token has expired
    world.call(federations.delete_federation, "south", world.now)
    missing = EnrolmentTokenCreate(federations=["default", "nowhere"])
    assert code_of(world, enrolment.create_token, missing, world.now) is ErrorCode.FEDERATION_NOT_FOUND
    with pytest.raises(DomainError) as caught:
        world.create_run(federation="nowhere")
    assert caught.value.code is ErrorCode.FEDERATION_NOT_FOUND
    device = world.enrol("a")
    for name, device_id, code in [
        ("nowhere", device, ErrorCode.FEDERATION_NOT_FOUND),
        ("north", "dev_0", ErrorCode.DEVICE_NOT_FOUND),
    ]:
        for function in (federations.add_device, federations.remove_device):
            assert code_of(world, function, name, device_id, world.now) is code


def test_only_its_devices_get_a_runs_work(world: World) -> None:
    found(world, "north")
    inside, outside = enrol_into(world, "in", "north"), world.enrol("out")
    run = world.start_run(federation="north", min_updates=1, grace_seconds=60)
    assert world.poll(outside) is None
    world.deliver(inside)
    # Nobody else of the federation is there to be waited for.
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING


def test_a_device_joins_and_leaves_while_runs_go_on(world: World) -> None:
    found(world, "north")
    device, other = world.enrol("a"), enrol_into(world, "b", "north")
    run = world.start_run(federation="north", min_updates=2)
    assert world.poll(device) is None
    for _ in range(2):
        world.call(federations.add_device, "north", device, world.now)
    assert world.call(devices.get_device, device).federations == ["default", "north"]
    assignment = world.take(device)
    for _ in range(2):
        world.call(federations.remove_device, "north", device, world.now)
    world.upload(assignment, device)  # what it was doing it may finish
    world.submit(assignment, device)
    world.deliver(other)
    world.finish_round()
    assert world.round(run.run_id, 2).number == 2
    assert world.poll(device) is None
    told = [event.type for event in world.events() if event.device_id == device and event.data.get("federation")]
    assert told == [EventType.FEDERATION_DEVICE_ADDED, EventType.FEDERATION_DEVICE_REMOVED]


def test_the_devices_that_a_run_names_must_be_of_its_federation(world: World) -> None:
    found(world, "north")
    inside, outside = enrol_into(world, "in", "north", "default"), world.enrol("out")
    assert world.create_run(federation="north", device_ids=[inside]).federation == "north"
    with pytest.raises(DomainError, match="not enrolled in federation 'north'") as caught:
        world.create_run(federation="north", device_ids=[inside, outside])
    assert caught.value.code is ErrorCode.DEVICE_NOT_FOUND


def test_lists_are_filtered(world: World) -> None:
    found(world, "north")
    both, plain = enrol_into(world, "both", "north", "default"), enrol_into(world, "plain", "default")
    run, other = world.create_run(federation="north"), world.create_run()
    in_north = world.call(devices.list_devices, federation="north").items
    assert [each.device_id for each in in_north] == [both]
    assert in_north[0].federations == ["default", "north"]
    assert [each.device_id for each in world.call(devices.list_devices, federation="default").items] == [both, plain]
    assert [each.run_id for each in world.call(runs.list_runs, federation="north").items] == [run.run_id]
    assert [each.run_id for each in world.call(runs.list_runs, federation="default").items] == [other.run_id]
    assert world.call(runs.list_runs, federation="nowhere").items == []


def test_a_device_of_two_federations_works_for_both_in_turn(world: World) -> None:
    """Of two runs with many rounds neither waits for the other's last one."""
    found(world, "north")
    device = enrol_into(world, "both", "north", "default")
    order = []
    names = {world.start_run(rounds=3).run_id: "default"}
    world.wait(1)
    names[world.start_run(rounds=3, federation="north").run_id] = "north"
    for _ in range(6):
        world.wait(1)
        order.append(names[world.deliver(device).run_id])
        world.finish_round()
    assert order == ["default", "north"] * 3
    assert {world.run(run_id).status for run_id in names} == {RunStatus.COMPLETED}
    assert world.poll(device) is None


def test_several_runs_at_a_time_each_with_its_own_devices_and_fate(world: World) -> None:
    """Three runs, two federations, three devices: one completes, one is retried, one is paused, and none disturbs."""
    found(world, "north")
    a, b = enrol_into(world, "a", "default"), enrol_into(world, "b", "north")
    both = enrol_into(world, "both", "default", "north")
    settings = {"rounds": 2, "min_updates": 2, "grace_seconds": 0, "round_deadline_seconds": 1000}
    south = world.start_run(name="south", **settings)
    world.wait(1)
    north = world.start_run(name="north", federation="north", **settings)
    world.wait(1)
    held = world.start_run(name="held", device_ids=[a], **(settings | {"min_updates": 1}))
    world.call(run_moves.pause_run, held.run_id, "later", world.now)
    world.call(runs.fail_run, north.run_id, ErrorCode.JOB_FAILED, "no memory", world.now)
    world.call(run_moves.retry_run, north.run_id, world.now)
    for number in (1, 2):
        world.wait(1)
        assert world.deliver(a).run_id == south.run_id
        assert world.deliver(both).run_id == south.run_id
        world.finish_round()
        assert world.run(south.run_id).latest_version == number
        world.wait(1)
        assert world.deliver(b).run_id == north.run_id
        assert world.deliver(both).run_id == north.run_id
        world.finish_round()
    assert [world.run(run.run_id).status for run in (south, north)] == [RunStatus.COMPLETED] * 2
    assert world.run(held.run_id).status is RunStatus.PAUSED
    world.call(run_moves.resume_run, held.run_id, world.now)
    for _ in range(2):
        assert world.deliver(a).run_id == held.run_id
        world.finish_round()
    assert world.run(held.run_id).status is RunStatus.COMPLETED
    assert world.poll(both) is None
