"""Updates after the closing of their round: refused, kept, or counted once by a later one."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persistence import devices, run_moves, runs, updates, versions
from persistence.errors import RoundClosed
from protocol.assignments import Assignment
from protocol.errors import DomainError, ErrorCode
from protocol.runs import Run, RunCreate
from protocol.statuses import AssignmentStatus, PartKind, RunStatus
from tests.persistence.world import World

NEXT = {"late_updates": "next_round", "grace_seconds": 0, "rounds": 6}


def late(world: World, assignment: Assignment, device: str) -> Any:
    world.upload(assignment, device)
    return world.submit(assignment, device)


def staleness(world: World, round_id: str) -> dict[str, int | None]:
    return {each.assignment_id: each.staleness for each in world.call(updates.submitted_updates, round_id)}


def quick_round(world: World, device: str, *, promoted: bool = True) -> None:
    world.deliver(device)
    world.finish_round(promoted=promoted)


def start(world: World, **changed: Any) -> tuple[Run, str, str, Assignment]:
    """A run whose slow device still has round 1 when that is published."""
    quick, slow = world.enrol_many("quick", "slow")
    run = world.start_run(**{**NEXT, **changed})
    assignment = world.take(slow)
    quick_round(world, quick)
    return run, quick, slow, assignment


def test_a_late_update_counts_in_the_next_round_that_closes_and_only_there(world: World) -> None:
    run, quick, slow, assignment = start(world)
    # Not refused, so the agent trains on although the round is over.
    assert world.report(assignment, slow, AssignmentStatus.TRAINING) is AssignmentStatus.OFFERED
    receipt = late(world, assignment, slow)
    assert receipt.counts_in == "later_round"
    assert late(world, assignment, slow) == receipt
    shown = world.round(run.run_id, 1).devices[1]
    assert (shown.status, shown.late, shown.used_in_round) == (AssignmentStatus.LATE, True, None)
    fresh = world.deliver(quick)
    assert staleness(world, fresh.round_id) == {assignment.assignment_id: 1, fresh.assignment_id: None}
    world.finish_round()
    shown = world.round(run.run_id, 1).devices[1]
    assert (shown.status, shown.used_in_round, shown.staleness) == (AssignmentStatus.COUNTED, 2, 1)
    assert world.call(versions.get_version, run.run_id, 1).num_updates == 1
    made = world.call(versions.get_version, run.run_id, 2)
    assert (made.num_updates, made.lineage[0].num_late_updates) == (2, 1)
    assert late(world, assignment, slow) == receipt
    third = world.deliver(quick)
    assert staleness(world, third.round_id) == {third.assignment_id: None}
    given = world.call(versions.contributions, world.call(versions.get_version, run.run_id, 2))
    assert (given.num_devices, given.num_updates, given.num_examples) == (2, 3, 80)


def test_an_aggregation_that_is_killed_and_done_again_has_the_same_late_updates(world: World) -> None:
    """One more comes between the two; it is for the round after."""
    a, b, c = world.enrol_many("a", "b", "c")
    world.start_run(**NEXT)
    first, second = world.take(b), world.take(c)
    quick_round(world, a)
    late(world, first, b)
    fresh = world.deliver(a)
    job = world.claim_newest("killed")
    before = world.call(updates.submitted_updates, fresh.round_id)
    late(world, second, c)
    world.wait(21)
    assert world.claim(job.job_id, "next") is not None
    assert world.call(updates.submitted_updates, fresh.round_id) == before
    world.call(world.finish_aggregation, job, "next")
    world.call(world.finish_aggregation, job, "next")
    assert world.call(updates.submitted_updates, fresh.round_id) == before
    world.call(world.finish_co_tuning, world.claim_newest(), "worker")
    world.call(world.finish_evaluation, world.claim_newest(), "worker")
    third = world.deliver(a)
    assert staleness(world, third.round_id) == {third.assignment_id: None}  # c's base is two versions old by now


def test_a_base_that_is_too_old_is_refused_before_a_byte_of_it_comes(world: World) -> None:
    run, quick, slow, assignment = start(world, max_staleness=1)
    quick_round(world, quick)
    for _ in range(2):
        with pytest.raises(RoundClosed, match="2 versions old, and max_staleness is 1"):
            world.call(updates.admit_part, slow, assignment.assignment_id, PartKind.LOGITS, world.now)
    with pytest.raises(DomainError) as caught:
        world.report(assignment, slow, AssignmentStatus.TRAINING)
    assert caught.value.code is ErrorCode.ROUND_CLOSED
    assert world.statuses(run.run_id)["slow"] is AssignmentStatus.LATE


def test_versions_that_were_not_promoted_do_not_make_an_update_older(world: World) -> None:
    _run, quick, slow, assignment = start(world, max_staleness=1)
    quick_round(world, quick, promoted=False)
    quick_round(world, quick, promoted=False)
    late(world, assignment, slow)
    fresh = world.deliver(quick)
    assert staleness(world, fresh.round_id)[assignment.assignment_id] == 1


def test_late_updates_are_kept_and_not_used_if_the_run_says_so(world: World) -> None:
    run, quick, slow, assignment = start(world, late_updates="keep")
    receipt = late(world, assignment, slow)
    assert receipt.counts_in == "no_round"
    quick_round(world, quick)
    shown = world.round(run.run_id, 1).devices[1]
    assert (shown.status, shown.late, shown.used_in_round) == (AssignmentStatus.LATE, True, None)
    assert world.call(versions.get_version, run.run_id, 2).num_updates == 1


def test_a_late_update_does_not_stand_in_for_a_fresh_one(world: World) -> None:
    """`min_updates` counts those of the round itself."""
    quick, slow, third = world.enrol_many("quick", "slow", "third")
    run = world.start_run(**NEXT | {"min_updates": 2})
    assignment = world.take(slow)
    world.deliver(quick)
    world.deliver(third)
    world.finish_round()
    late(world, assignment, slow)
    fresh = [world.deliver(quick), world.deliver(third)]
    assert len(staleness(world, fresh[0].round_id)) == 3
    world.call(updates.reject_update, fresh[0].assignment_id, ErrorCode.NON_FINITE_VALUES, "NaN", world.now)
    world.aggregate(counted=[fresh[1].assignment_id, assignment.assignment_id])
    shown = world.run(run.run_id)
    assert (shown.status, shown.error_code) == (RunStatus.FAILED, ErrorCode.TOO_FEW_UPDATES)
    # Neither was counted: both are there for the round that a retry opens.
    world.call(run_moves.retry_run, run.run_id, world.now)
    again = [world.deliver(quick), world.deliver(third)]
    ages = staleness(world, again[0].round_id)
    assert (ages[assignment.assignment_id], ages[fresh[1].assignment_id], len(ages)) == (1, 0, 4)


def test_a_late_update_that_the_worker_refuses_is_rejected(world: World) -> None:
    run, quick, slow, assignment = start(world)
    late(world, assignment, slow)
    world.deliver(quick)
    arguments = (assignment.assignment_id, ErrorCode.NORM_OUT_OF_RANGE, "too long", world.now)
    world.call(updates.reject_update, *arguments)
    world.finish_round()
    assert world.statuses(run.run_id, 1)["slow"] is AssignmentStatus.REJECTED
    assert world.call(versions.get_version, run.run_id, 2).num_updates == 1


def test_what_a_failed_round_had_counted_stays_with_it(world: World) -> None:
    run, quick, slow, assignment = start(world)
    late(world, assignment, slow)
    world.deliver(quick)
    world.aggregate()
    world.call(runs.fail_run, run.run_id, ErrorCode.JOB_FAILED, "no memory", world.now)
    world.call(run_moves.retry_run, run.run_id, world.now)
    fresh = world.deliver(quick)
    assert staleness(world, fresh.round_id) == {fresh.assignment_id: None}


def test_a_revoked_devices_late_update_is_not_used(world: World) -> None:
    _run, quick, slow, assignment = start(world)
    late(world, assignment, slow)
    world.call(devices.revoke_device, slow, world.now)
    fresh = world.deliver(quick)
    assert staleness(world, fresh.round_id) == {fresh.assignment_id: None}


def test_an_update_from_a_withdrawn_base_is_not_used(world: World) -> None:
    quick, slow, other = world.enrol_many("quick", "slow", "other")
    run = world.start_run(**NEXT)
    quick_round(world, quick)
    sent, unsent = world.take(slow), world.take(other)  # from version 1
    quick_round(world, quick)
    late(world, sent, slow)
    world.call(run_moves.roll_back_run, run.run_id, 0, "worse", world.now)
    with pytest.raises(RoundClosed, match="version 1, was withdrawn"):
        late(world, unsent, other)
    fresh = world.deliver(quick)
    assert staleness(world, fresh.round_id) == {fresh.assignment_id: None}


def test_nothing_is_taken_for_a_run_that_is_over(world: World) -> None:
    run, _quick, slow, assignment = start(world)
    world.call(runs.stop_run, run.run_id, "no", world.now)
    with pytest.raises(RoundClosed, match="the run is stopped"):
        late(world, assignment, slow)


def test_settings_that_cannot_work_are_refused() -> None:
    plain = {"name": "run", "rounds": 1, "llm": "llm", "public_data": "public", "late_updates": "next_round"}
    RunCreate.model_validate({**plain, "strategy": {"name": "co_plms"}})
    for strategy in ({"name": "standalone"}, {"name": "co_plms", "aggregation": "exact_svd"}):
        with pytest.raises(ValueError, match="fedavg"):
            RunCreate.model_validate({**plain, "strategy": strategy})
    with pytest.raises(ValueError, match="sampling_deadline_seconds"):
        RunCreate.model_validate({**plain, "strategy": {"name": "co_plms"}, "sampling_deadline_seconds": 3600})


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_update_counts_at_most_once_whatever_happens(world: World, data: st.DataObject) -> None:
    """Devices are late or not, rounds fail and are retried, versions are withdrawn: no update counts twice."""
    ids = world.enrol_many("a", "b")
    run = world.start_run(**NEXT | {"rounds": 20, "max_staleness": data.draw(st.integers(0, 2))})
    held: list[tuple[Assignment, str]] = []
    for _ in range(5):
        if world.run(run.run_id).status is RunStatus.FAILED:
            world.call(run_moves.retry_run, run.run_id, world.now)
        if data.draw(st.booleans()):
            held.append((world.take(ids[1]), ids[1]))
        world.deliver(ids[0])
        ending = data.draw(st.sampled_from(["publish", "refuse", "fail", "roll back"]))
        if held and data.draw(st.booleans()):
            _try_late(world, *held.pop(0))
        if ending == "fail":
            world.call(runs.fail_run, run.run_id, ErrorCode.JOB_FAILED, "no memory", world.now)
        elif ending == "roll back":
            world.call(run_moves.roll_back_run, run.run_id, 0, "worse", world.now)
            if world.round(run.run_id, world.run(run.run_id).current_round).status == "aggregating":
                world.finish_round()  # it was at version 0 already
        else:
            world.finish_round(promoted=ending == "publish")
    counted = [event.data["assignment_id"] for event in world.events(run.run_id) if event.data.get("to") == "counted"]
    assert len(counted) == len(set(counted))
    made = world.call(versions.list_versions, run.run_id).items
    assert sum(version.num_updates for version in made) <= len(counted)


def _try_late(world: World, assignment: Assignment, device: str) -> None:
    try:
        late(world, assignment, device)
    except RoundClosed:
        assert world.call(updates.submitted_updates, assignment.round_id) is not None
