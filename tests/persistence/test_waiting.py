"""What a run waits for, since when and until when, in every phase."""

from datetime import datetime, timedelta

from persistence import jobs, rounds, run_moves, runs
from persistence.waiting import of_run
from protocol.runs import Run, Waiting
from protocol.statuses import AssignmentStatus, RunStatus, WaitingFor
from tests.persistence.world import START, World


def waits(world: World, run: Run) -> Waiting:
    shown = world.call(runs.get_run, run.run_id, world.now)
    assert shown.waiting is not None
    return shown.waiting


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def test_every_phase_of_a_run(world: World) -> None:
    a, b, c = world.enrol_many("a", "b", "c")
    world.now = START
    run = world.create_run(rounds=1, min_updates=2, grace_seconds=60, round_deadline_seconds=1800)
    assert waits(world, run) == Waiting(what=WaitingFor.WORKER, since=START)
    world.wait(10)
    job = world.claim_newest()
    assert waits(world, run) == Waiting(what=WaitingFor.PREPARATION, since=at(10), until=at(30))
    world.call(world.finish_prepare, job, "worker")
    assert waits(world, run) == Waiting(what=WaitingFor.DEVICES, since=at(10), until=at(1810))
    taken = [world.take(device) for device in (a, b)]
    assert waits(world, run) == Waiting(what=WaitingFor.UPDATES, since=at(10), until=at(1810))
    for seconds, device, assignment in zip((5, 7), (a, b), taken, strict=True):
        world.wait(seconds)
        world.upload(assignment, device)
        world.submit(assignment, device)
    assert waits(world, run) == Waiting(what=WaitingFor.STRAGGLERS, since=at(22), until=at(82))
    world.wait(60)
    world.call(rounds.close_due_rounds, world.now)
    assert waits(world, run) == Waiting(what=WaitingFor.WORKER, since=at(82))
    stages = [
        (WaitingFor.AGGREGATION, world.finish_aggregation),
        (WaitingFor.CO_TUNING, world.finish_co_tuning),
        (WaitingFor.EVALUATION, world.finish_evaluation),
    ]
    for what, finish in stages:
        world.wait(1)
        claimed, job = world.now, world.claim_newest()
        assert waits(world, run) == Waiting(what=what, since=claimed, until=claimed + timedelta(seconds=20))
        assert world.round(run.run_id).waiting == waits(world, run)
        world.call(finish, job, "worker")
    ended = world.run(run.run_id)
    assert (ended.status, ended.waiting, world.round(run.run_id).waiting) == (RunStatus.COMPLETED, None, None)
    assert world.poll(c) is None


def test_a_sampling_deadline_is_when_the_wait_for_devices_ends(world: World) -> None:
    world.enrol("a")
    run = world.start_run(min_updates=1, sampling_deadline_seconds=30)
    assert waits(world, run) == Waiting(what=WaitingFor.DEVICES, since=START, until=at(30))


def test_a_worker_that_is_gone_is_told_from_one_that_works(world: World) -> None:
    run = world.create_run()
    job = world.claim_newest("fragile")
    world.wait(21)
    assert waits(world, run) == Waiting(what=WaitingFor.LOST_WORKER, since=at(20))
    reason = world.call(runs.get_run, run.run_id, world.now).status_reason or ""
    assert reason == "the preparation waits for another worker: the lease of fragile ran out at 12:00:20Z".replace(
        "12:00:20Z", "2026-03-01 12:00:20Z"
    )
    world.call(jobs.due_for_sending, world.now, 10)
    assert waits(world, run) == Waiting(what=WaitingFor.WORKER, since=at(21))
    assert world.claim(job.job_id, "next") is not None
    assert waits(world, run) == Waiting(what=WaitingFor.PREPARATION, since=at(21), until=at(41))


def test_a_job_behind_others_is_in_a_queue(world: World) -> None:
    world.create_run()
    world.claim_newest()
    second = world.create_run()
    assert waits(world, second) == Waiting(what=WaitingFor.QUEUE, since=START)
    assert "1 other job is being done" in (world.call(runs.get_run, second.run_id, world.now).status_reason or "")
    world.wait(21)  # the other one's worker is gone: there is no queue, there is no worker
    assert waits(world, second).what is WaitingFor.WORKER


def test_a_paused_run_says_by_whom_and_its_round_too(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    world.report(world.take(device), device, AssignmentStatus.TRAINING)
    world.wait(5)
    world.call(run_moves.pause_run, run.run_id, "wait", world.now, by="ada")
    assert waits(world, run) == Waiting(what=WaitingFor.OPERATOR, since=at(5), by="ada")
    assert world.round(run.run_id).waiting == waits(world, run)
    assert waits(world, run).model_dump(mode="json")["for"] == "operator"


def test_a_list_of_runs_says_it_as_well(world: World) -> None:
    run = world.create_run()
    listed = world.call(runs.list_runs, now=world.now).items
    assert [each.waiting for each in listed] == [waits(world, run)]


def test_a_run_that_failed_waits_for_nothing(world: World) -> None:
    run = world.create_run()
    world.call(runs.stop_run, run.run_id, "no", world.now)
    with world.database.reading() as session:
        assert of_run(session, runs.find_run(session, run.run_id), world.now) == ("no", None)
