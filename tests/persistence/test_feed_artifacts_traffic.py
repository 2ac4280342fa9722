"""The event feed, the register of files, and the count of bytes."""

import pytest
from sqlalchemy.exc import IntegrityError

from persistence import artifacts, events, traffic, updates
from persistence.tables import ArtifactRow, RunArtifactRow
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.statuses import PartKind
from tests.persistence.world import START, World, sha


def test_the_feed_is_read_from_where_one_stopped(world: World) -> None:
    first = world.create_run()
    world.create_run()
    everything = world.events()
    assert [event.sequence for event in everything] == sorted(event.sequence for event in everything)
    assert len(everything) == 4
    with world.database.reading() as session:
        page = events.list_events(session, run_id=None, after=everything[0].sequence, limit=2)
        assert page == everything[1:3]
        assert events.list_events(session, run_id=first.run_id, after=0, limit=10) == everything[:2]
        assert events.list_events(session, run_id=None, after=10**30, limit=10) == []
        assert events.last_sequence(session) == everything[-1].sequence
        assert events.last_sequence(session, run_id=first.run_id) == everything[1].sequence
        assert events.last_sequence(session, run_id="run_0") == 0


def test_an_event_says_what_it_is_about(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    assignment = world.deliver(device)
    (event,) = [event for event in world.events(run.run_id) if event.type is EventType.UPDATE_SUBMITTED]
    assert (event.time, event.run_id, event.round_id, event.device_id) == (
        START,
        run.run_id,
        assignment.round_id,
        device,
    )
    assert event.data["assignment_id"] == assignment.assignment_id
    assert event.data["num_examples"] == 40


def test_events_of_a_transaction_that_fails_are_not_told(world: World) -> None:
    def fail() -> None:
        with world.database.transaction() as session:
            events.append(session, EventType.ROUND_METRICS, START)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert world.events() == []


def test_a_file_is_registered_once_a_run_and_role(world: World) -> None:
    first = world.create_run()
    world.wait(1)
    second = world.create_run()
    for run in (first, first, second):
        world.call(artifacts.register, sha("x"), 5, "adapter", run.run_id, world.now)
    assert (world.count(ArtifactRow), world.count(RunArtifactRow)) == (1, 2)
    found = world.call(artifacts.get, sha("x"))
    assert (found.sha256, found.size_bytes, found.kind, found.run_id) == (sha("x"), 5, "adapter", second.run_id)
    with pytest.raises(ValueError, match="expected one of proxy_base"):
        world.call(artifacts.register, sha("x"), 5, "diary", first.run_id, world.now)
    with pytest.raises(IntegrityError):
        world.call(artifacts.register, sha("y"), 5, "adapter", "run_0", world.now)
    with pytest.raises(DomainError) as caught:
        world.call(artifacts.get, sha("z"))
    assert caught.value.code is ErrorCode.ARTIFACT_NOT_FOUND


def test_a_device_may_fetch_the_files_of_its_own_runs_only(world: World) -> None:
    mine, other = world.enrol("mine"), world.enrol("other")
    run = world.start_run(device_ids=[mine])
    assignment = world.take(mine)
    arguments = (mine, assignment.assignment_id, PartKind.LOGITS, sha("my logits"), 10, world.now)
    world.call(updates.record_part, *arguments)
    for kind in ("proxy_base", "adapter", "probe_set"):
        found = world.call(artifacts.get_for_device, sha(kind), mine)
        assert (found.kind, found.run_id) == (kind, run.run_id)
        with pytest.raises(DomainError):
            world.call(artifacts.get_for_device, sha(kind), other)
    for content in ("llm_adapter", "my logits", "unknown"):
        with pytest.raises(DomainError) as caught:
            world.call(artifacts.get_for_device, sha(content), mine)
        assert caught.value.code is ErrorCode.ARTIFACT_NOT_FOUND


def test_a_file_of_two_runs_counts_for_the_newest_that_gave_the_device_work(world: World) -> None:
    device = world.enrol("a")
    first = world.start_run(rounds=1)
    world.deliver(device)
    world.wait(1)
    world.start_run(device_ids=[world.enrol("b")])
    assert world.call(artifacts.get_for_device, sha("proxy_base"), device).run_id == first.run_id


def test_bytes_add_up_by_direction_and_kind(world: World) -> None:
    a, b = world.enrol("a"), world.enrol("b")
    run, other = world.create_run(), world.create_run()
    assert world.call(traffic.totals, run.run_id).model_dump() == {"up": {}, "down": {}}
    for device, direction, kind, num_bytes in [
        (a, "up", "logits", 10),
        (a, "up", "logits", 5),
        (b, "up", "logits", 1),
        (b, "down", "logits", 100),
        (b, "up", "adapter_delta", 2**40),
    ]:
        world.call(traffic.add, run.run_id, device, direction, kind, num_bytes)
    world.call(traffic.add, other.run_id, a, "up", "logits", 7)
    totals = world.call(traffic.totals, run.run_id)
    assert totals.up == {"adapter_delta": 2**40, "logits": 16}
    assert totals.down == {"logits": 100}
