"""Runs: what creating, stopping and failing leave behind, and what they say while they wait."""

import pytest

from persistence import jobs, runs, updates
from persistence.errors import IllegalTransition, LeaseLost
from persistence.tables import JobRow
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.statuses import AssignmentStatus, JobKind, JobStatus, RoundStatus, RunStatus
from tests.persistence.world import START, World


def test_creating_a_run_queues_its_preparation(world: World) -> None:
    run = world.create_run(name="first", seed=7)
    assert run.status is RunStatus.PENDING
    assert run.config.seed == 7
    assert (run.current_round, run.latest_version, run.error_code, run.finished_at) == (0, None, None, None)
    assert world.run(run.run_id) == run
    assert world.sent == [world.job_id(JobKind.PREPARE_RUN, run.run_id)]
    assert [event.type for event in world.events(run.run_id)] == [EventType.RUN_CREATED, EventType.JOB_QUEUED]


def test_devices_of_a_run_must_exist_and_suffice(world: World) -> None:
    device = world.enrol("a")
    with pytest.raises(DomainError, match="dev_0, dev_1") as caught:
        world.create_run(device_ids=[device, "dev_1", "dev_0"])
    assert caught.value.code is ErrorCode.DEVICE_NOT_FOUND
    with pytest.raises(DomainError, match="`min_updates` is 2") as caught:
        world.create_run(device_ids=[device, device], min_updates=2)
    assert caught.value.code is ErrorCode.INVALID_FIELD
    assert world.create_run(device_ids=[device]).config.device_ids == [device]


def test_unknown_runs(world: World) -> None:
    for function, arguments in [
        (runs.get_run, ()),
        (runs.stop_run, ("why", START)),
        (runs.fail_run, (ErrorCode.JOB_FAILED, "why", START)),
    ]:
        with pytest.raises(DomainError, match="run_0") as caught:
            world.call(function, "run_0", *arguments)
        assert caught.value.code is ErrorCode.RUN_NOT_FOUND


def test_lists_show_the_newest_first_in_pages(world: World) -> None:
    ids = []
    for _ in range(3):
        world.wait(1)
        ids.append(world.create_run().run_id)
    world.call(runs.stop_run, ids[0], "no", world.now)
    first = world.call(runs.list_runs, limit=2)
    assert [run.run_id for run in first.items] == [ids[2], ids[1]]
    second = world.call(runs.list_runs, limit=2, cursor=first.next_cursor)
    assert [run.run_id for run in second.items] == [ids[0]]
    assert second.next_cursor is None
    stopped = world.call(runs.list_runs, status=RunStatus.STOPPED)
    assert [run.run_id for run in stopped.items] == [ids[0]]


def test_stopping_ends_everything_of_the_run(world: World) -> None:
    submitted, training, fresh = world.enrol_many("submitted", "training", "fresh")
    run = world.start_run(min_updates=3)
    world.deliver(submitted)
    assignment = world.take(training)
    world.report(assignment, training, AssignmentStatus.TRAINING)
    stopped = world.call(runs.stop_run, run.run_id, "wrong data", world.now)
    assert (stopped.status, stopped.status_reason) == (RunStatus.STOPPED, "wrong data")
    assert stopped.finished_at == world.now
    shown = world.round(run.run_id)
    assert (shown.status, shown.status_reason) == (RoundStatus.ABANDONED, "wrong data")
    assert world.statuses(run.run_id) == {"submitted": AssignmentStatus.REJECTED, "training": AssignmentStatus.LOST}
    assert all("wrong data" in (device.reason or "") for device in shown.devices)
    assert world.poll(fresh) is None
    assert world.poll(training) is None


def test_stopping_drops_the_jobs_and_the_worker_notices(world: World) -> None:
    world.enrol("a")
    run = world.create_run()
    job = world.claim_newest("worker")
    world.call(runs.stop_run, run.run_id, "no", world.now)
    assert world.job_status(job.job_id) is JobStatus.FAILED
    assert world.call(jobs.renew, job.job_id, "worker", 20, world.now) is False
    assert world.claim(job.job_id, "other") is None
    assert world.call(jobs.due_for_sending, world.now, 0) == []
    with pytest.raises(LeaseLost):
        world.call(world.finish_prepare, job, "worker")
    assert world.run(run.run_id).status is RunStatus.STOPPED


def test_stopping_in_the_middle_of_each_stage(world: World) -> None:
    """Whatever the stage, the round is abandoned, the worker's result is refused, and counted updates stay counted."""
    device = world.enrol("a")
    for stage in range(3):
        run = world.start_run(rounds=1)
        world.deliver(device)
        if stage > 0:
            world.aggregate()
        if stage > 1:
            world.call(world.finish_co_tuning, world.claim_newest(), "worker")
        job = world.claim_newest()
        world.call(runs.stop_run, run.run_id, "no", world.now)
        finish = (world.finish_aggregation, world.finish_co_tuning, world.finish_evaluation)[stage]
        with pytest.raises(LeaseLost):
            world.call(finish, job, "worker")
        assert world.round(run.run_id).status is RoundStatus.ABANDONED
        expected = AssignmentStatus.COUNTED if stage else AssignmentStatus.REJECTED
        assert world.statuses(run.run_id) == {"a": expected}


def test_stopping_again_changes_nothing_and_what_has_ended_cannot_be_stopped(world: World) -> None:
    run = world.create_run()
    first = world.call(runs.stop_run, run.run_id, "no", world.now)
    world.wait(5)
    assert world.call(runs.stop_run, run.run_id, "again", world.now) == first
    failed = world.create_run()
    world.call(runs.fail_run, failed.run_id, ErrorCode.MODEL_FOLDER_MISSING, "no folder llm", world.now)
    with pytest.raises(IllegalTransition, match="is failed and cannot become stopped"):
        world.call(runs.stop_run, failed.run_id, "no", world.now)


def test_a_failed_run_says_why(world: World) -> None:
    run = world.create_run()
    world.call(runs.fail_run, run.run_id, ErrorCode.MODEL_FOLDER_MISSING, "no folder llm", world.now)
    shown = world.run(run.run_id)
    assert (shown.status, shown.error_code) == (RunStatus.FAILED, ErrorCode.MODEL_FOLDER_MISSING)
    assert shown.status_reason == "no folder llm"
    world.call(runs.fail_run, run.run_id, ErrorCode.JOB_FAILED, "later", world.now)
    assert world.run(run.run_id) == shown


def test_a_reason_longer_than_its_column_is_cut(world: World) -> None:
    run = world.create_run()
    world.call(runs.fail_run, run.run_id, ErrorCode.JOB_FAILED, "x" * 10_000, world.now)
    assert len(world.run(run.run_id).status_reason or "") == 2000


def test_what_a_run_waits_for(world: World) -> None:
    a, b, c = world.enrol_many("a", "b", "c")
    world.now = START
    run = world.create_run(min_updates=2, grace_seconds=60, round_deadline_seconds=1800)

    def reason() -> str | None:
        return world.run(run.run_id).status_reason

    assert reason() == "the preparation waits for a worker since 2026-03-01 12:00:00Z"
    job = world.claim_newest()
    assert reason() == "the preparation runs"
    world.call(world.finish_prepare, job, "worker")
    until = "until 2026-03-01 12:30:00Z"
    assert reason() == f"round 1 waits for 2 more updates of 2 (no device has taken it yet), {until}"
    world.deliver(a)
    assert reason() == f"round 1 waits for 1 more update of 2 (have: a), {until}"
    taken = world.take(b)
    assert reason() == f"round 1 waits for 1 more update of 2 (have: a; at work: b has not answered), {until}"
    world.report(taken, b, AssignmentStatus.TRAINING)
    assert reason() == f"round 1 waits for 1 more update of 2 (have: a; at work: b training), {until}"
    world.upload(taken, b)
    world.submit(taken, b)
    assert (
        reason()
        == "round 1 waits for stragglers, with 2 updates of at least 2 (have: a, b), until 2026-03-01 12:01:00Z"
    )
    world.deliver(c)
    assert reason() == "round 1 waits for a worker since 2026-03-01 12:00:00Z"
    world.aggregate()
    assert world.claim_newest()
    assert reason() == "round 1 co-tunes the LLM and the proxy"
    world.wait(30)
    world.call(jobs.due_for_sending, world.now, 10)
    lost = "attempt 2: the lease of worker ran out at 12:00:20Z"
    assert reason() == f"round 1 waits for a worker since 2026-03-01 12:00:00Z, {lost}"
    assert world.round(run.run_id).status_reason == reason()


def test_many_devices_are_not_all_named(world: World) -> None:
    devices = world.enrol_many(*(f"d{number:02}" for number in range(14)))
    run = world.start_run(min_updates=14)
    for device in devices[:12]:
        world.take(device)
    reason = world.run(run.run_id).status_reason or ""
    assert "d09 has not answered and 2 more" in reason
    assert "d10" not in reason


def test_a_refused_update_is_not_counted_as_had(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(min_updates=1)
    assignment = world.deliver(device)
    world.call(updates.reject_update, assignment.assignment_id, ErrorCode.NON_FINITE_VALUES, "NaN", world.now)
    job = world.claim_newest()
    world.call(world.finish_aggregation, job, "worker")
    shown = world.run(run.run_id)
    assert (shown.status, shown.error_code) == (RunStatus.FAILED, ErrorCode.TOO_FEW_UPDATES)
    assert shown.status_reason == "round 1 has 0 usable updates of the 1 it needs; not counted: non_finite_values: NaN"
    assert world.round(run.run_id).status is RoundStatus.ABANDONED
    assert world.job_status(job.job_id) is JobStatus.DONE
    assert world.count(JobRow) == 2
