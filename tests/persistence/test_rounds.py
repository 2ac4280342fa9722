"""When a round closes, what it closes with, and what the sweep does."""

import pytest

from persistence import devices, rounds
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import AssignmentStatus, JobKind, RoundStatus, RunStatus
from tests.persistence.world import START, World, sha


def sweep(world: World) -> int:
    return world.call(rounds.close_due_rounds, world.now)


def test_it_closes_when_everybody_has_answered(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    run = world.start_run(min_updates=1, grace_seconds=60)
    world.deliver(a)
    assert world.round(run.run_id).status is RoundStatus.COLLECTING  # b is registered and may still come.
    world.deliver(b)
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING
    assert world.sent[-1] == world.job_id(JobKind.AGGREGATE_ROUND, world.round(run.run_id).round_id)


def test_it_does_not_wait_for_a_device_that_is_offline_unless_the_run_names_it(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    world.wait(100)
    world.poll(a)
    world.call(devices.mark_silent_devices, world.now, 60)
    run = world.start_run(min_updates=1)
    world.deliver(a)
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING
    named = world.start_run(min_updates=1, device_ids=[a, b])
    world.deliver(a)
    assert world.round(named.run_id).status is RoundStatus.COLLECTING


def test_it_waits_for_stragglers_until_the_grace_is_over(world: World) -> None:
    a, b, c = world.enrol_many("a", "b", "c")
    run = world.start_run(min_updates=1, grace_seconds=60)
    slow = world.take(b)
    world.wait(10)
    world.deliver(a)
    world.wait(59)
    assert sweep(world) == 0
    world.upload(slow, b)
    world.submit(slow, b)  # Within the grace: it counts, and does not prolong the grace.
    world.wait(1)
    assert world.take(c).run_id == run.run_id
    assert sweep(world) == 1
    shown = world.round(run.run_id)
    assert shown.status is RoundStatus.AGGREGATING
    assert sweep(world) == 0
    assert world.call(rounds.mark_lost_assignments, world.now) == 1
    assert world.call(rounds.mark_lost_assignments, world.now) == 0
    assert world.statuses(run.run_id) == {
        "a": AssignmentStatus.SUBMITTED,
        "b": AssignmentStatus.SUBMITTED,
        "c": AssignmentStatus.LOST,
    }
    assert "the device had not delivered" in (world.round(run.run_id).devices[2].reason or "")


def test_it_closes_at_once_without_grace(world: World) -> None:
    a, _b = world.enrol_many("a", "b")
    run = world.start_run(min_updates=1, grace_seconds=0)
    world.deliver(a)
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING


def test_it_closes_when_max_updates_came(world: World) -> None:
    a, b, _c = world.enrol_many("a", "b", "c")
    run = world.start_run(min_updates=1, max_updates=2, grace_seconds=60)
    world.deliver(a)
    assert world.round(run.run_id).status is RoundStatus.COLLECTING
    world.deliver(b)
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING


def test_the_grace_ends_with_the_deadline(world: World) -> None:
    a, _b = world.enrol_many("a", "b")
    run = world.start_run(min_updates=1, grace_seconds=1000, round_deadline_seconds=100)
    world.deliver(a)
    world.wait(99)
    assert sweep(world) == 0
    world.wait(1)
    assert sweep(world) == 1
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING


def test_too_few_updates_at_the_deadline_end_the_run_and_say_who_was_missing(world: World) -> None:
    a, b, c = world.enrol_many("a", "b", "c")
    world.now = START
    run = world.start_run(min_updates=3, round_deadline_seconds=100)
    world.deliver(a)
    world.report(world.take(b), b, AssignmentStatus.TRAINING)
    world.wait(100)
    assert sweep(world) == 1
    shown = world.run(run.run_id)
    assert (shown.status, shown.error_code) == (RunStatus.FAILED, ErrorCode.TOO_FEW_UPDATES)
    assert shown.status_reason == (
        "round 1 has 1 of the 3 updates it needs at its deadline, 2026-03-01 12:01:40Z, without an update: b (training)"
    )
    assert world.round(run.run_id).status is RoundStatus.ABANDONED
    assert world.statuses(run.run_id) == {"a": AssignmentStatus.REJECTED, "b": AssignmentStatus.LOST}
    assert world.poll(c) is None


def test_a_run_that_nobody_joins_does_not_wait_for_ever(world: World) -> None:
    run = world.start_run(min_updates=1, round_deadline_seconds=100)
    world.wait(100)
    assert sweep(world) == 1
    assert "no other device took it" in (world.run(run.run_id).status_reason or "")


def test_a_refused_update_may_make_room_for_the_end(world: World) -> None:
    """A device that refuses is not waited for."""
    from persistence import assignments
    from protocol.assignments import AssignmentRefusal

    a, b = world.enrol_many("a", "b")
    run = world.start_run(min_updates=1, grace_seconds=1000)
    world.deliver(a)
    taken = world.take(b)
    refusal = AssignmentRefusal(reason="no", code="battery")
    world.call(assignments.refuse_assignment, b, taken.assignment_id, refusal, world.now)
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING


def test_a_round_is_shown_with_its_devices(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    run = world.start_run(rounds=3)
    world.take(b)
    world.take(a)
    shown = world.round(run.run_id)
    assert [device.device_name for device in shown.devices] == ["a", "b"]
    assert (shown.number, shown.base_version, shown.metrics) == (1, 0, {})
    with pytest.raises(DomainError, match="rounds 1 to 1, not 2") as caught:
        world.round(run.run_id, 2)
    assert caught.value.code is ErrorCode.ROUND_NOT_FOUND
    with pytest.raises(DomainError) as caught:
        world.round(run.run_id, 10**12)
    assert caught.value.code is ErrorCode.ROUND_NOT_FOUND
    with pytest.raises(DomainError) as caught:
        world.round("run_0", 1)
    assert caught.value.code is ErrorCode.RUN_NOT_FOUND


def test_rounds_come_in_pages(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=3)
    for _ in range(3):
        world.deliver(device)
        world.finish_round()
    first = world.call(rounds.list_rounds, run.run_id, limit=2)
    assert [item.number for item in first.items] == [3, 2]
    second = world.call(rounds.list_rounds, run.run_id, limit=2, cursor=first.next_cursor)
    assert [item.number for item in second.items] == [1]
    assert second.next_cursor is None
    for cursor in ("x", "-1", "٣", "9" * 40, ""):
        with pytest.raises(DomainError) as caught:
            world.call(rounds.list_rounds, run.run_id, cursor=cursor)
        assert caught.value.code is ErrorCode.INVALID_FIELD


def test_a_worker_reads_what_each_stage_needs(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    world.deliver(device)
    world.aggregate()
    job = world.claim_newest()
    world.call(world.finish_co_tuning, job, "worker")
    context = world.call(rounds.get_context, job.round_id)
    assert (context.run_id, context.number, context.base_version) == (run.run_id, 1, 0)
    assert context.config == run.config
    assert context.base_adapter_sha256 == sha("adapter")
    assert context.base_llm_adapter_sha256 == sha("llm_adapter")
    assert context.aggregated_adapter_sha256 == sha("aggregate 1")
    assert context.candidate_adapter_sha256 == sha("candidate 1")
    assert context.candidate_llm_adapter_sha256 == sha("candidate llm 1")
    assert context.proxy_manifest_sha256 == sha("proxy_base")
    assert context.probe_set_sha256 == sha("probe_set")
    assert context.metrics == {"num_updates": 1, "losses": {"llm": 1.5}}
    with pytest.raises(DomainError) as caught:
        world.call(rounds.get_context, "rnd_0")
    assert caught.value.code is ErrorCode.ROUND_NOT_FOUND


def test_the_server_optimizer_goes_on_from_the_base_version(world: World) -> None:
    """Version 2 is not promoted, so round 3 starts from version 1 and from the state of round 1."""
    device = world.enrol("a")
    run = world.start_run(rounds=3)
    states = []
    for promoted in (True, False, True):
        world.deliver(device)
        context = world.call(rounds.get_context, world.round(run.run_id, len(states) + 1).round_id)
        states.append((context.base_version, context.base_optimizer_sha256))
        world.finish_round(promoted=promoted)
    assert states == [(0, None), (1, sha("optimizer 1")), (1, sha("optimizer 1"))]
