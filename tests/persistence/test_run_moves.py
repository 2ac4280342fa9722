"""Pausing, resuming, retrying and rolling back: what each leaves, what it refuses, and what it never does twice."""

from datetime import timedelta

import pytest

from persistence import devices, jobs, rounds, run_moves, runs, updates, versions
from persistence.errors import LeaseLost, RoundClosed
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.runs import Run
from protocol.statuses import AssignmentStatus, JobKind, JobStatus, RoundStatus, RunStatus
from tests.persistence.world import START, World, sha


def pause(world: World, run: Run) -> Run:
    return world.call(run_moves.pause_run, run.run_id, "wait", world.now)


def resume(world: World, run: Run) -> Run:
    return world.call(run_moves.resume_run, run.run_id, world.now)


def retry(world: World, run: Run) -> Run:
    return world.call(run_moves.retry_run, run.run_id, world.now)


def roll_back(world: World, run: Run, version: int) -> Run:
    return world.call(run_moves.roll_back_run, run.run_id, version, "worse", world.now)


def fail(world: World, run: Run) -> None:
    world.call(runs.fail_run, run.run_id, ErrorCode.JOB_FAILED, "the disk is full", world.now)


def play(world: World, device: str, *, promoted: bool = True) -> None:
    world.deliver(device)
    world.finish_round(promoted=promoted)


def refused(world: World, code: ErrorCode, function: object, *arguments: object) -> DomainError:
    before = world.snapshot()
    with pytest.raises(DomainError) as caught:
        world.call(function, *arguments)  # type: ignore[arg-type]
    assert caught.value.code is code
    assert world.snapshot() == before
    return caught.value


def test_a_paused_run_offers_nothing_new_and_lets_devices_finish(world: World) -> None:
    busy, fresh = world.enrol_many("busy", "fresh")
    run = world.start_run(min_updates=2)
    assignment = world.take(busy)
    paused = pause(world, run)
    assert (paused.status, paused.status_reason) == (RunStatus.PAUSED, "wait")
    assert world.poll(fresh) is None
    assert world.take(busy).assignment_id == assignment.assignment_id  # its agent was restarted
    world.report(assignment, busy, AssignmentStatus.TRAINING)
    world.upload(assignment, busy)
    world.submit(assignment, busy)
    assert world.statuses(run.run_id) == {"busy": AssignmentStatus.SUBMITTED}
    resumed = resume(world, run)
    assert (resumed.status, resumed.waiting is not None) == (RunStatus.RUNNING, True)
    assert world.take(fresh).run_id == run.run_id


def test_the_clock_of_a_paused_run_stands_still(world: World) -> None:
    a, b, _c = world.enrol_many("a", "b", "c")
    run = world.start_run(min_updates=1, grace_seconds=60, round_deadline_seconds=100)
    slow = world.take(b)
    world.deliver(a)
    deadline = world.round(run.run_id).deadline_at
    world.wait(30)
    pause(world, run)
    world.wait(1000)  # far beyond grace and deadline
    assert world.call(rounds.close_due_rounds, world.now) == 0
    world.upload(slow, b)
    world.submit(slow, b)
    resume(world, run)
    assert world.round(run.run_id).deadline_at == deadline + timedelta(seconds=1000)
    world.wait(29)
    assert world.call(rounds.close_due_rounds, world.now) == 0
    world.wait(1)
    assert world.call(rounds.close_due_rounds, world.now) == 1
    assert world.statuses(run.run_id) == {"a": AssignmentStatus.SUBMITTED, "b": AssignmentStatus.SUBMITTED}


def test_resuming_closes_a_round_that_got_everything_meanwhile(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    assignment = world.take(device)
    pause(world, run)
    world.upload(assignment, device)
    world.submit(assignment, device)
    assert world.round(run.run_id).status is RoundStatus.COLLECTING
    resume(world, run)
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING


@pytest.mark.parametrize("rounds_in_all", [1, 2])
def test_the_worker_finishes_a_paused_run_and_the_next_round_opens_when_it_is_resumed(
    world: World, rounds_in_all: int
) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=rounds_in_all)
    world.deliver(device)
    pause(world, run)
    world.finish_round()
    shown = world.run(run.run_id)
    assert (shown.status, shown.latest_version, shown.current_round) == (RunStatus.PAUSED, 1, 1)
    assert world.poll(device) is None
    resumed = resume(world, run)
    if rounds_in_all == 1:
        assert resumed.status is RunStatus.COMPLETED
    else:
        assert (resumed.status, resumed.current_round) == (RunStatus.RUNNING, 2)
        assert world.take(device).round_number == 2


def test_pausing_and_resuming_again_change_nothing(world: World) -> None:
    world.enrol("a")
    run = world.start_run()
    first = pause(world, run)
    before = world.snapshot()
    world.wait(5)
    assert pause(world, run) == first
    assert world.snapshot() == before
    resume(world, run)
    before = world.snapshot()
    resume(world, run)
    assert world.snapshot() == before


def test_what_may_not_be_paused_resumed_or_retried(world: World) -> None:
    device = world.enrol("a")
    created, ended, stopped = (world.create_run(rounds=1) for _ in range(3))
    world.prepare(ended.run_id)
    play(world, device)
    world.call(runs.stop_run, stopped.run_id, "no", world.now)
    paused = world.start_run()
    pause(world, paused)
    running = world.start_run()
    failed = world.start_run()
    fail(world, failed)
    every = {"pending": created, "completed": ended, "stopped": stopped, "paused": paused, "running": running}
    every |= {"failed": failed}
    allowed = {"pause": {"running", "paused"}, "resume": {"paused", "running"}, "retry": {"failed"}}
    allowed |= {"rollback": {"running", "paused", "failed"}}
    for status, run in every.items():
        assert world.run(run.run_id).status == status
        moves = {
            "pause": (run_moves.pause_run, run.run_id, "x", world.now),
            "resume": (run_moves.resume_run, run.run_id, world.now),
            "retry": (run_moves.retry_run, run.run_id, world.now),
            "rollback": (run_moves.roll_back_run, run.run_id, 0, "x", world.now),
        }
        for name, (function, *arguments) in moves.items():
            if status not in allowed[name]:
                refused(world, ErrorCode.ILLEGAL_TRANSITION, function, *arguments)
    for function, arguments in [
        (run_moves.pause_run, ("x", START)),
        (run_moves.resume_run, (START,)),
        (run_moves.retry_run, (START,)),
        (run_moves.roll_back_run, (0, "x", START)),
    ]:
        refused(world, ErrorCode.RUN_NOT_FOUND, function, "run_0", *arguments)


def test_a_paused_run_can_be_stopped(world: World) -> None:
    world.enrol("a")
    run = world.start_run()
    pause(world, run)
    stopped = world.call(runs.stop_run, run.run_id, "no", world.now)
    assert (stopped.status, stopped.waiting) == (RunStatus.STOPPED, None)
    assert world.round(run.run_id).status is RoundStatus.ABANDONED


def test_a_failed_round_is_opened_again_from_the_same_base(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    run = world.start_run(rounds=2, min_updates=2, round_deadline_seconds=100)
    world.deliver(a)
    world.wait(100)
    world.call(rounds.close_due_rounds, world.now)
    assert world.run(run.run_id).error_code is ErrorCode.TOO_FEW_UPDATES
    shown = retry(world, run)
    assert (shown.status, shown.error_code, shown.finished_at) == (RunStatus.RUNNING, None, None)
    second = world.round(run.run_id)
    assert (second.number, second.attempt, second.base_version) == (1, 2, 0)
    assert second.deadline_at == world.now + timedelta(seconds=100)
    for device in (a, b):
        world.deliver(device)
    world.finish_round()
    assert world.call(versions.get_version, run.run_id, 1).num_updates == 2
    first = world.call(rounds.get_round, run.run_id, 1, attempt=1)
    assert (first.status, [device.status for device in first.devices]) == (RoundStatus.ABANDONED, ["rejected"])
    listed = world.call(rounds.list_rounds, run.run_id, limit=2)
    assert [(item.number, item.attempt) for item in listed.items] == [(2, 1), (1, 2)]
    rest = world.call(rounds.list_rounds, run.run_id, cursor=listed.next_cursor)
    assert [(item.number, item.attempt) for item in rest.items] == [(1, 1)]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_was_counted_before_a_failure_is_not_counted_again(world: World, stage: int) -> None:
    """The worker fails for good in each of its stages; the retried round is played by the same device."""
    device = world.enrol("a")
    run = world.start_run(rounds=1)
    old = world.deliver(device)
    if stage > 0:
        world.aggregate()
    if stage > 1:
        world.call(world.finish_co_tuning, world.claim_newest(), "worker")
    job = world.claim_newest()
    world.call(jobs.fail, job.job_id, "worker", ErrorCode.JOB_FAILED, "no memory", world.now, retry=False)
    retry(world, run)
    new = world.deliver(device)
    assert (new.round_number, new.base_version) == (1, 0)
    assert new.assignment_id != old.assignment_id
    records = world.call(updates.submitted_updates, new.round_id)
    assert [record.assignment_id for record in records] == [new.assignment_id]
    finish = (world.finish_aggregation, world.finish_co_tuning, world.finish_evaluation)[stage]
    with pytest.raises(LeaseLost):
        world.call(finish, job, "worker")
    world.finish_round()
    shown = world.call(versions.get_version, run.run_id, 1)
    assert (shown.num_updates, shown.lineage[0].attempt, shown.lineage[0].parent) == (1, 2, 0)
    assert world.run(run.run_id).status is RunStatus.COMPLETED
    counted = [event.data["assignment_id"] for event in world.events() if event.data.get("to") == "counted"]
    assert len(counted) == len(set(counted)) == (2 if stage else 1)


def test_too_few_usable_updates_leave_none_counted(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    run = world.start_run(min_updates=2)
    good = world.deliver(a)
    bad = world.deliver(b)
    world.call(updates.reject_update, bad.assignment_id, ErrorCode.NON_FINITE_VALUES, "NaN", world.now)
    world.aggregate(counted=[good.assignment_id])
    assert world.run(run.run_id).error_code is ErrorCode.TOO_FEW_UPDATES
    assert set(world.statuses(run.run_id).values()) == {AssignmentStatus.REJECTED}


def test_a_failed_preparation_is_queued_again(world: World) -> None:
    device = world.enrol("a")
    run = world.create_run(rounds=1)
    job = world.claim_newest()
    world.call(jobs.fail, job.job_id, "worker", ErrorCode.MODEL_FOLDER_MISSING, "no llm", world.now, retry=False)
    sent = len(world.sent)
    shown = retry(world, run)
    assert (shown.status, shown.status_reason is not None) == (RunStatus.PENDING, True)
    assert world.sent[sent:] == [job.job_id]
    assert world.job_status(job.job_id) is JobStatus.QUEUED
    again = world.claim(job.job_id, "another")
    assert again is not None
    assert again.attempts == 1
    assert world.run(run.run_id).status is RunStatus.PREPARING
    with pytest.raises(LeaseLost):
        world.call(world.finish_prepare, job, "worker")
    world.call(world.finish_prepare, again, "another")
    play(world, device)
    assert world.run(run.run_id).status is RunStatus.COMPLETED


def test_a_rollback_withdraws_what_came_after_and_opens_the_round_again_from_there(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    run = world.start_run(rounds=4, grace_seconds=0)
    for _ in range(3):
        play(world, a)
    submitted, training = world.take(a), world.take(b)
    world.upload(submitted, a)
    shown = roll_back(world, run, 1)
    assert (shown.status, shown.latest_version, shown.current_round) == (RunStatus.RUNNING, 1, 4)
    again = world.round(run.run_id, 4)
    assert (again.attempt, again.base_version, again.status) == (2, 1, RoundStatus.OPEN)
    before = world.call(rounds.get_round, run.run_id, 4, attempt=1)
    assert before.status is RoundStatus.ABANDONED
    assert {device.status for device in before.devices} == {AssignmentStatus.LOST}
    with pytest.raises(RoundClosed):
        world.upload(training, b)
    assert world.take(a).adapter.sha256 == sha("candidate 1")  # type: ignore[union-attr]
    listed = world.call(versions.list_versions, run.run_id).items
    assert [(version.number, version.withdrawn_at is not None) for version in listed] == [
        (3, True), (2, True), (1, False), (0, False),
    ]  # fmt: skip
    assert listed[0].withdrawn_reason == "rolled back to version 1: worse"
    event = next(event for event in world.events(run.run_id) if event.type is EventType.RUN_ROLLED_BACK)
    assert event.data == {"from": 3, "to": 1, "reason": "worse", "by": "an operator"}
    play(world, a)
    made = world.call(versions.get_version, run.run_id, 4)
    assert [step.number for step in made.lineage] == [4, 1, 0]
    assert world.run(run.run_id).latest_version == 4


@pytest.mark.parametrize("stage", ["submitted", "aggregating", "evaluating"])
def test_a_rollback_takes_the_round_from_the_worker(world: World, stage: str) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=3)
    play(world, device)
    world.deliver(device)
    if stage == "evaluating":
        world.aggregate()
        world.call(world.finish_co_tuning, world.claim_newest(), "worker")
    job = world.claim_newest() if stage != "submitted" else None
    roll_back(world, run, 0)
    if job is not None:
        finish = world.finish_aggregation if stage == "aggregating" else world.finish_evaluation
        with pytest.raises(LeaseLost):
            world.call(finish, job, "worker")
    assert world.round(run.run_id, 2).base_version == 0
    play(world, device)
    assert world.call(versions.get_version, run.run_id, 2).parent == 0


def test_the_servers_message_and_state_go_with_their_version(world: World) -> None:
    """To the next round of a promoted one; back with a rollback; not on from one that was not promoted."""

    def base(number: int) -> tuple[int, str | None, str | None]:
        context = world.call(rounds.get_context, world.round(run.run_id, number).round_id)
        return context.base_version, context.base_message_sha256, context.base_server_state_sha256

    device = world.enrol("a")
    run = world.start_run(rounds=4)
    assert base(1) == (0, None, None)
    play(world, device)
    first = (1, sha("message 1"), sha("state 1"))
    assert base(2) == first
    assignment = world.deliver(device)
    assert assignment.message is not None
    assert assignment.message.sha256 == sha("message 1")
    world.finish_round(promoted=False)
    assert base(3) == first
    play(world, device)
    assert base(4) == (3, sha("message 3"), sha("state 3"))
    roll_back(world, run, 1)
    assert base(4) == first


def test_the_server_optimizer_goes_back_too(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=3)
    play(world, device)
    play(world, device)
    roll_back(world, run, 1)
    context = world.call(rounds.get_context, world.round(run.run_id, 3).round_id)
    assert context.base_optimizer_sha256 == sha("optimizer 1")
    roll_back(world, run, 0)
    context = world.call(rounds.get_context, world.round(run.run_id, 3).round_id)
    assert (context.base_version, context.base_optimizer_sha256) == (0, None)


def test_a_paused_or_failed_run_goes_back_and_opens_the_round_later(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=3)
    play(world, device)
    pause(world, run)
    assert roll_back(world, run, 0).status is RunStatus.PAUSED
    assert world.round(run.run_id, 2).status is RoundStatus.ABANDONED
    resume(world, run)
    assert (world.round(run.run_id, 2).attempt, world.round(run.run_id, 2).base_version) == (2, 0)
    play(world, device)
    fail(world, run)
    assert roll_back(world, run, 0).status is RunStatus.FAILED
    retry(world, run)
    assert (world.round(run.run_id, 3).attempt, world.round(run.run_id, 3).base_version) == (2, 0)


def test_where_a_rollback_may_not_go(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=5)
    for promoted in (True, False, True):
        play(world, device, promoted=promoted)
    back = run_moves.roll_back_run
    refused(world, ErrorCode.VERSION_NOT_FOUND, back, run.run_id, 4, "x", world.now)
    error = refused(world, ErrorCode.VERSION_NOT_PROMOTED, back, run.run_id, 2, "x", world.now)
    assert "was not promoted" in error.detail
    before = world.snapshot()
    roll_back(world, run, 3)  # where it is
    assert world.snapshot() == before
    roll_back(world, run, 1)
    error = refused(world, ErrorCode.VERSION_NOT_PROMOTED, back, run.run_id, 3, "x", world.now)
    assert "was withdrawn" in error.detail


def test_a_sampling_deadline_fails_the_run_early(world: World) -> None:
    a, _b = world.enrol_many("a", "b")
    run = world.start_run(min_updates=2, sampling_deadline_seconds=10, round_deadline_seconds=1000)
    world.take(a)
    world.wait(9)
    assert world.call(rounds.close_due_rounds, world.now) == 0
    world.wait(1)
    assert world.call(rounds.close_due_rounds, world.now) == 1
    shown = world.run(run.run_id)
    assert (shown.status, shown.error_code) == (RunStatus.FAILED, ErrorCode.TOO_FEW_DEVICES)
    assert "1 of the 2 devices that round 1 needs had taken it by" in (shown.status_reason or "")


def test_a_sampling_deadline_pauses_the_run_and_starts_anew_when_it_is_resumed(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    settings = {"sampling_deadline_seconds": 10, "round_deadline_seconds": 1000, "too_few_devices": "pause"}
    run = world.start_run(min_updates=2, **settings)
    first = world.take(a)
    world.wait(10)
    world.call(rounds.close_due_rounds, world.now)
    shown = world.run(run.run_id)
    assert shown.status is RunStatus.PAUSED
    assert shown.waiting is not None
    assert shown.waiting.by == "the sampling deadline"
    world.wait(3600)
    resume(world, run)
    assert world.call(rounds.close_due_rounds, world.now) == 0
    world.wait(9)
    world.take(b)
    world.wait(100)  # both have taken it: the sampling deadline is done with, also when one then gives up
    assert world.call(rounds.close_due_rounds, world.now) == 0
    world.call(devices.revoke_device, b, world.now)
    world.call(rounds.close_due_rounds, world.now)
    assert world.run(run.run_id).status is RunStatus.RUNNING
    assert world.take(a).assignment_id == first.assignment_id


def test_a_retried_round_has_one_job_a_stage(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=1)
    world.deliver(device)
    old = world.round(run.run_id).round_id
    fail(world, run)
    retry(world, run)
    world.deliver(device)
    new = world.round(run.run_id).round_id
    assert world.job_status(world.job_id(JobKind.AGGREGATE_ROUND, old)) is JobStatus.FAILED
    assert world.job_status(world.job_id(JobKind.AGGREGATE_ROUND, new)) is JobStatus.QUEUED
