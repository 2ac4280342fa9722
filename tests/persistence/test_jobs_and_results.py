"""Leases, results that are stored once, and a run that survives its workers."""

from collections.abc import Callable
from typing import Any

import pytest

from persistence import jobs, results, versions
from persistence.errors import IllegalTransition, LeaseLost
from persistence.jobs import MAX_ATTEMPTS, JobRecord
from persistence.tables import JobRow, RoundRow, VersionRow
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.statuses import AssignmentStatus, JobKind, JobStatus, RoundStatus, RunStatus
from tests.persistence.world import World, sha


def sweep(world: World, resend_after_seconds: float = 10) -> list[str]:
    messages = world.call(jobs.due_for_sending, world.now, resend_after_seconds)
    world.call(jobs.mark_sent, [message.job_id for message in messages], world.now)
    return [message.job_id for message in messages]


def test_a_lease_keeps_others_away_until_it_runs_out(world: World) -> None:
    run = world.create_run()
    job = world.claim_newest("one")
    assert (job.kind, job.run_id, job.round_id, job.attempts) == (JobKind.PREPARE_RUN, run.run_id, None, 1)
    assert world.run(run.run_id).status is RunStatus.PREPARING
    assert world.claim(job.job_id, "two") is None
    assert world.claim(job.job_id, "one") is None
    world.wait(15)
    assert world.call(jobs.renew, job.job_id, "one", 20, world.now)
    assert not world.call(jobs.renew, job.job_id, "two", 20, world.now)
    world.wait(15)
    assert world.claim(job.job_id, "two") is None
    world.wait(6)
    taken = world.claim(job.job_id, "two")
    assert taken is not None
    assert taken.attempts == 2
    assert not world.call(jobs.renew, job.job_id, "one", 20, world.now)
    assert world.claim("job_0") is None


def test_the_sweep_sends_what_was_not_claimed(world: World) -> None:
    world.create_run()
    job_id = world.sent[-1]
    assert sweep(world) == []  # It was sent by the commit.
    world.wait(10)
    assert sweep(world) == [job_id]
    assert sweep(world) == []
    world.wait(10)
    assert sweep(world) == [job_id]
    assert world.claim(job_id) is not None
    world.wait(19)
    assert sweep(world) == []


def test_the_sweep_queues_what_lost_its_worker(world: World) -> None:
    world.create_run()
    job = world.claim_newest("one")
    world.wait(21)
    assert sweep(world) == [job.job_id]
    assert world.job_status(job.job_id) is JobStatus.QUEUED
    assert EventType.JOB_RESENT in [event.type for event in world.events()]
    again = world.claim(job.job_id, "two")
    assert again is not None
    assert again.attempts == 2


def test_a_job_that_always_loses_its_worker_ends_the_run(world: World) -> None:
    run = world.create_run()
    for _ in range(MAX_ATTEMPTS):
        assert world.claim(world.sent[-1], "fragile") is not None
        world.wait(21)
        sweep(world)
    shown = world.run(run.run_id)
    assert (shown.status, shown.error_code) == (RunStatus.FAILED, ErrorCode.JOB_FAILED)
    assert shown.status_reason == "prepare_run lost its worker 5 times; the last one was fragile"
    assert world.claim(world.sent[-1]) is None
    assert sweep(world) == []


def test_a_claim_of_an_expired_last_attempt_ends_the_run_too(world: World) -> None:
    run = world.create_run()
    for _ in range(MAX_ATTEMPTS):
        assert world.claim(world.sent[-1], "fragile") is not None
        world.wait(21)
    assert world.claim(world.sent[-1], "next") is None
    assert world.run(run.run_id).status is RunStatus.FAILED


def test_a_failure_is_tried_again_a_few_times(world: World) -> None:
    run = world.create_run()
    job_id = world.sent[-1]
    for attempt in range(1, MAX_ATTEMPTS + 1):
        job = world.claim(job_id)
        assert job is not None
        assert job.attempts == attempt
        arguments = (job_id, "worker", ErrorCode.UNAVAILABLE, "the disk is full", world.now)
        world.call(jobs.fail, *arguments, retry=True)
        if attempt < MAX_ATTEMPTS:
            assert world.job_status(job_id) is JobStatus.QUEUED
            assert "the disk is full" in (world.run(run.run_id).status_reason or "")
            assert sweep(world) == []  # Not at once: the cause may need a moment to go away.
            world.wait(10)
            assert sweep(world) == [job_id]
    shown = world.run(run.run_id)
    assert (shown.status, shown.error_code) == (RunStatus.FAILED, ErrorCode.UNAVAILABLE)
    assert shown.status_reason == "the disk is full (attempt 5)"


def test_workers_that_were_asked_to_stop_never_use_up_the_attempts(world: World) -> None:
    run = world.create_run()
    job_id = world.sent[-1]
    for _ in range(MAX_ATTEMPTS + 2):
        job = world.claim(job_id)
        assert job is not None
        assert job.attempts == 1
        with pytest.raises(LeaseLost, match="it is leased to worker"):
            world.call(jobs.release, job_id, "another", "the worker was stopped", world.now)
        world.call(jobs.release, job_id, "worker", "the worker was stopped", world.now)
        with pytest.raises(LeaseLost, match="the job is queued"):
            world.call(jobs.release, job_id, "worker", "the worker was stopped", world.now)
        world.wait(10)
        assert sweep(world) == [job_id]
    with pytest.raises(LeaseLost, match="there is no such job"):
        world.call(jobs.release, "job_0", "worker", "the worker was stopped", world.now)
    assert world.run(run.run_id).status is RunStatus.PREPARING


def test_a_failure_for_good_fails_the_run_and_its_round(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    world.deliver(device)
    job = world.claim_newest()
    reason = "coverage 0.61, expected at least 0.8"
    world.call(jobs.fail, job.job_id, "worker", ErrorCode.COVERAGE_TOO_LOW, reason, world.now, retry=False)
    shown = world.run(run.run_id)
    assert (shown.status, shown.error_code, shown.status_reason) == (
        RunStatus.FAILED,
        ErrorCode.COVERAGE_TOO_LOW,
        reason,
    )
    assert world.round(run.run_id).status is RoundStatus.FAILED
    assert world.job_status(job.job_id) is JobStatus.FAILED


def test_only_the_holder_can_fail_a_job(world: World) -> None:
    world.create_run()
    job = world.claim_newest("one")
    for job_id in (job.job_id, "job_0"):
        with pytest.raises(LeaseLost):
            world.call(jobs.fail, job_id, "two", ErrorCode.JOB_FAILED, "x", world.now, retry=False)
    assert world.job_status(job.job_id) is JobStatus.CLAIMED


def test_a_job_of_a_stage_exists_once(world: World) -> None:
    from sqlalchemy.exc import IntegrityError

    run = world.create_run()
    with pytest.raises(IntegrityError):
        world.call(jobs.queue, JobKind.PREPARE_RUN, run.run_id, None, world.now)


def test_preparing_opens_the_first_round(world: World) -> None:
    run = world.create_run()
    job = world.claim_newest()
    world.call(world.finish_prepare, job, "worker")
    shown = world.run(run.run_id)
    assert (shown.status, shown.current_round, shown.latest_version) == (RunStatus.RUNNING, 1, 0)
    version = world.call(versions.get_version, run.run_id, 0)
    assert (version.promoted, version.round_id, version.num_updates) == (True, None, 0)
    assert version.proxy_adapter_sha256 == sha("adapter")
    assert version.llm_adapter_sha256 == sha("llm_adapter")
    assert version.metrics == {"validation": {}}
    assert world.job_status(job.job_id) is JobStatus.DONE


def test_a_whole_run(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    run = world.start_run(rounds=2)
    for number in (1, 2):
        world.wait(60)
        world.deliver(a)
        world.deliver(b)
        world.finish_round()
        shown = world.round(run.run_id, number)
        assert (shown.status, shown.finished_at) == (RoundStatus.PUBLISHED, world.now)
        assert shown.metrics == {"num_updates": 2, "losses": {"llm": 1.5}, "validation": {"llm": 3.0}}
        assert set(world.statuses(run.run_id, number).values()) == {AssignmentStatus.COUNTED}
        version = world.call(versions.get_version, run.run_id, number)
        assert (version.promoted, version.num_updates, version.round_id) == (True, 2, shown.round_id)
        assert version.proxy_adapter_sha256 == sha(f"candidate {number}")
        assert version.llm_adapter_sha256 == sha(f"candidate llm {number}")
    assert world.round(run.run_id, 2).base_version == 1
    shown_run = world.run(run.run_id)
    assert (shown_run.status, shown_run.latest_version, shown_run.current_round) == (RunStatus.COMPLETED, 2, 2)
    assert shown_run.finished_at == world.now
    assert world.poll(a) is None


def test_a_version_that_is_not_promoted_is_kept_and_not_built_upon(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=3)
    for promoted in (True, False):
        world.deliver(device)
        world.finish_round(promoted=promoted)
    listed = world.call(versions.list_versions, run.run_id)
    assert [(version.number, version.promoted) for version in listed.items] == [(2, False), (1, True), (0, True)]
    assert world.run(run.run_id).latest_version == 1
    assert world.round(run.run_id, 3).base_version == 1
    adapter = world.take(device).adapter
    assert adapter is not None
    assert adapter.sha256 == sha("candidate 1")
    assert world.round(run.run_id, 2).status_reason == "version 2 is kept and not promoted"


def test_versions_come_in_pages_and_unknown_ones_are_named(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=1)
    world.deliver(device)
    world.finish_round()
    first = world.call(versions.list_versions, run.run_id, limit=1)
    second = world.call(versions.list_versions, run.run_id, limit=1, cursor=first.next_cursor)
    assert [version.number for version in first.items + second.items] == [1, 0]
    assert second.next_cursor is None
    for run_id, number, code in [
        (run.run_id, 2, ErrorCode.VERSION_NOT_FOUND),
        (run.run_id, 10**15, ErrorCode.VERSION_NOT_FOUND),
        ("run_0", 0, ErrorCode.RUN_NOT_FOUND),
    ]:
        with pytest.raises(DomainError) as caught:
            world.call(versions.get_version, run_id, number)
        assert caught.value.code is code


def test_updates_that_the_worker_left_out_are_rejected(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    run = world.start_run(min_updates=1)
    first = world.deliver(a)
    world.deliver(b)
    world.aggregate(counted=[first.assignment_id])
    assert world.statuses(run.run_id) == {"a": AssignmentStatus.COUNTED, "b": AssignmentStatus.REJECTED}


def test_only_submitted_updates_of_the_round_can_be_counted(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    world.start_run(min_updates=1, grace_seconds=0)
    not_submitted = world.take(a)
    world.deliver(b)
    job = world.claim_newest()
    before = world.snapshot()
    with pytest.raises(IllegalTransition):
        world.call(world.finish_aggregation, job, "worker", counted=[not_submitted.assignment_id])
    with pytest.raises(DomainError, match="asg_0"):
        world.call(world.finish_aggregation, job, "worker", counted=["asg_0"])
    assert world.snapshot() == before


STAGES: list[tuple[JobKind, str]] = [
    (JobKind.PREPARE_RUN, "finish_prepare"),
    (JobKind.AGGREGATE_ROUND, "finish_aggregation"),
    (JobKind.CO_TUNE_ROUND, "finish_co_tuning"),
    (JobKind.EVALUATE_ROUND, "finish_evaluation"),
]


def reach(world: World, stage: int) -> tuple[JobRecord, Callable[..., Any]]:
    """Bring a fresh run to a stage whose job the worker `one` has claimed."""
    device = world.enrol("a")
    run = world.create_run()
    for before, (kind, finish) in enumerate(STAGES):
        if kind is JobKind.AGGREGATE_ROUND:
            world.deliver(device)
        job = world.claim_newest("one")
        assert (job.kind, job.run_id) == (kind, run.run_id)
        if before == stage:
            return job, getattr(world, finish)
        world.call(getattr(world, finish), job, "one")
    raise AssertionError(stage)


@pytest.mark.parametrize("stage", range(4))
def test_each_stage_survives_the_death_of_its_worker(world: World, stage: int) -> None:
    """Claim, let the lease run out, let another one claim: the first's result is refused, the second's counts once."""
    job, finish = reach(world, stage)
    world.wait(21)
    assert sweep(world) == [job.job_id]
    with pytest.raises(LeaseLost, match="the job is queued"):
        world.call(finish, job, "one")
    again = world.claim(job.job_id, "two")
    assert again is not None
    before = world.snapshot()
    with pytest.raises(LeaseLost, match="leased to two"):
        world.call(finish, job, "one")
    assert world.snapshot() == before
    world.call(finish, again, "two")
    done = world.snapshot()
    assert done != before
    world.call(finish, again, "two")  # The answer to its commit was lost, and it tries again.
    with pytest.raises(LeaseLost, match="the job is done"):
        world.call(finish, job, "one")
    assert world.snapshot() == done
    assert world.claim(job.job_id, "three") is None


@pytest.mark.parametrize("stage", range(4))
def test_a_lease_that_ran_out_and_that_nobody_took_is_good_enough(world: World, stage: int) -> None:
    job, finish = reach(world, stage)
    world.wait(3600)
    world.call(finish, job, "one")
    assert world.job_status(job.job_id) is JobStatus.DONE


@pytest.mark.parametrize("stage", range(4))
def test_a_stage_that_fails_halfway_leaves_nothing(world: World, stage: int) -> None:
    job, finish = reach(world, stage)
    before, events = world.snapshot(), world.events()

    def power_cut() -> None:
        with world.database.transaction() as session:
            finish(session, job, "one")
            session.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        power_cut()
    assert world.snapshot() == before
    assert world.events() == events


def test_a_run_whose_workers_all_die_once_ends_as_one_whose_workers_live(world: World) -> None:
    """Every job of a run is claimed by a worker that dies first. Nothing is lost, nothing counted twice."""
    a, b = world.enrol_many("a", "b")
    run = world.create_run(rounds=2)
    while world.run(run.run_id).status not in (RunStatus.COMPLETED, RunStatus.FAILED):
        if world.run(run.run_id).status is RunStatus.RUNNING and world.poll(a) is not None:
            world.deliver(a)
            world.deliver(b)
        assert world.claim(world.sent[-1], "dies") is not None
        world.wait(25)
        (job_id,) = sweep(world)
        job = world.claim(job_id, "lives")
        assert job is not None
        assert job.attempts == 2
        world.call(getattr(world, dict(STAGES)[job.kind]), job, "lives")
    assert world.run(run.run_id).status is RunStatus.COMPLETED
    assert (world.count(VersionRow), world.count(RoundRow), world.count(JobRow)) == (3, 2, 7)
    counted = [event for event in world.events() if event.data.get("to") == "counted"]
    assert len(counted) == 4
    assert len({event.data["assignment_id"] for event in counted}) == 4


def test_a_finished_job_that_never_existed(world: World) -> None:
    run = world.create_run()
    job = JobRecord("job_0", JobKind.PREPARE_RUN, run.run_id, None, 1)
    with pytest.raises(LeaseLost, match="no such job"):
        world.call(results.finish_prepare, job, "worker", results.PrepareResult(), world.now)
