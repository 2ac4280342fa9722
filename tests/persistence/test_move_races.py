"""Operators, devices, the sweep and workers at the same moment, on connections of their own: each move happens once."""

from collections.abc import Callable
from typing import Any

from persistence import federations, rounds, run_moves, runs, updates, versions
from persistence.errors import LeaseLost, RoundClosed
from persistence.tables import FederationDeviceRow, FederationRow, RoundRow
from protocol.assignments import SubmissionReceipt
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.federations import Federation, FederationCreate
from protocol.runs import Run
from protocol.statuses import AssignmentStatus, RoundStatus, RunStatus
from tests.persistence.world import World

Action = Callable[[], Any]


def of(kind: type, answers: list[Any]) -> list[Any]:
    return [answer for answer in answers if isinstance(answer, kind)]


def pause(world: World, run: Run) -> Action:
    return lambda: world.call(run_moves.pause_run, run.run_id, "wait", world.now)


def resume(world: World, run: Run) -> Action:
    return lambda: world.call(run_moves.resume_run, run.run_id, world.now)


def retry(world: World, run: Run) -> Action:
    return lambda: world.call(run_moves.retry_run, run.run_id, world.now)


def roll_back(world: World, run: Run, version: int) -> Action:
    return lambda: world.call(run_moves.roll_back_run, run.run_id, version, "worse", world.now)


def fail(world: World, run: Run) -> Action:
    return lambda: world.call(runs.fail_run, run.run_id, ErrorCode.JOB_FAILED, "no memory", world.now)


def moves_to(world: World, run: Run, status: RunStatus) -> int:
    changed = [event.data["to"] for event in world.events(run.run_id) if event.type is EventType.RUN_STATUS_CHANGED]
    return changed.count(status.value)


def rounds_open(world: World, run: Run) -> int:
    with world.database.reading() as session:
        rows = session.query(RoundRow).filter_by(run_id=run.run_id).all()
    return sum(row.status in {RoundStatus.OPEN, RoundStatus.COLLECTING} for row in rows)


def test_pausing_twice_pauses_once_and_so_does_resuming(world: World) -> None:
    world.enrol("a")
    run = world.start_run()
    assert len(of(Run, world.race([pause(world, run)] * 4))) == 4
    assert moves_to(world, run, RunStatus.PAUSED) == 1
    assert len(of(Run, world.race([resume(world, run)] * 4))) == 4
    assert moves_to(world, run, RunStatus.RUNNING) == 2  # when it was prepared, and now


def test_two_retries_open_one_round(world: World) -> None:
    for _ in range(3):
        run = world.start_run()
        fail(world, run)()
        answers = world.race([retry(world, run)] * 3)
        assert len(of(Run, answers)) == 1
        assert {error.code for error in of(DomainError, answers)} == {ErrorCode.ILLEGAL_TRANSITION}
        assert (rounds_open(world, run), world.round(run.run_id).attempt) == (1, 2)


def test_two_retries_of_a_preparation_queue_one_job(world: World) -> None:
    run = world.create_run()
    fail(world, run)()
    sent = len(world.sent)
    answers = world.race([retry(world, run)] * 3)
    assert len(of(Run, answers)) == 1
    assert len(world.sent) == sent + 1


def test_resuming_and_the_worker_open_the_next_round_once(world: World) -> None:
    """The worker publishes the round of a paused run while it is resumed."""
    for _ in range(3):
        device = world.enrol("a")
        run = world.start_run(rounds=3, device_ids=[device])
        world.deliver(device)
        pause(world, run)()
        world.aggregate()
        world.call(world.finish_co_tuning, world.claim_newest(), "worker")
        job = world.claim_newest()
        answers = world.race([resume(world, run), lambda j=job: world.call(world.finish_evaluation, j, "worker")])
        assert not of(Exception, answers)
        assert (rounds_open(world, run), world.run(run.run_id).current_round) == (1, 2)


def test_a_rollback_and_the_worker(world: World) -> None:
    """Either the version came first and is withdrawn, or the round was abandoned and the result refused."""
    for _ in range(4):
        device = world.enrol("a")
        run = world.start_run(rounds=4, device_ids=[device])
        world.deliver(device)
        world.finish_round()
        world.deliver(device)
        world.aggregate()
        world.call(world.finish_co_tuning, world.claim_newest(), "worker")
        job = world.claim_newest()
        finish: Action = lambda j=job: world.call(world.finish_evaluation, j, "worker")  # noqa: E731
        answers = world.race([roll_back(world, run, 0), finish])
        assert isinstance(answers[0], Run)
        published = answers[1] is None
        assert published or isinstance(answers[1], LeaseLost)
        shown = world.run(run.run_id)
        assert (shown.latest_version, rounds_open(world, run)) == (0, 1)
        newest = world.round(run.run_id, shown.current_round)
        assert newest.base_version == 0
        listed = world.call(versions.list_versions, run.run_id).items
        assert [version.withdrawn_at is not None for version in listed] == [True] * (2 if published else 1) + [False]


def test_rollbacks_to_different_versions_at_once(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=4)
    for _ in range(2):
        world.deliver(device)
        world.finish_round()
    answers = world.race([roll_back(world, run, 0), roll_back(world, run, 1)])
    assert isinstance(answers[0], Run)  # version 0 can always be gone back to
    assert world.run(run.run_id).latest_version == 0
    assert rounds_open(world, run) == 1
    assert world.round(run.run_id, 3).base_version == 0
    assert isinstance(answers[1], Run) or answers[1].code is ErrorCode.VERSION_NOT_PROMOTED


def test_pause_stop_fail_and_retry_leave_one_of_them_in_force(world: World) -> None:
    for _ in range(3):
        device = world.enrol("a")
        run = world.start_run(device_ids=[device])
        stop: Action = lambda r=run: world.call(runs.stop_run, r.run_id, "no", world.now)  # noqa: E731
        answers = world.race([pause(world, run), stop, fail(world, run), retry(world, run)])
        errors = of(Exception, answers)
        assert {getattr(error, "code", error) for error in errors} <= {ErrorCode.ILLEGAL_TRANSITION}
        status = world.run(run.run_id).status
        assert rounds_open(world, run) == (status in {RunStatus.RUNNING, RunStatus.PAUSED})


def test_a_late_update_and_the_closing_of_the_next_round(world: World) -> None:
    """It is taken by that round or left for the one after; the device's receipt is the same, and it counts once."""
    for _ in range(3):
        quick, slow = world.enrol_many("quick", "slow")
        settings = {"rounds": 3, "grace_seconds": 0, "late_updates": "next_round", "max_staleness": 5}
        run = world.start_run(device_ids=[quick, slow], **settings)
        late = world.take(slow)
        world.deliver(quick)
        world.finish_round()
        fresh = world.take(quick)
        for assignment, device in ((late, slow), (fresh, quick)):
            world.upload(assignment, device)
        answers = world.race([lambda a=late, d=slow: world.submit(a, d), lambda a=fresh, d=quick: world.submit(a, d)])
        assert [answer.counts_in for answer in answers] == ["later_round", "this_round"]
        world.finish_round()
        world.deliver(quick)
        world.finish_round()
        counted = [
            event.data["assignment_id"] for event in world.events(run.run_id) if event.data.get("to") == "counted"
        ]
        assert counted.count(late.assignment_id) == 1
        assert world.round(run.run_id, 1).devices[1].used_in_round in {2, 3}


def test_the_same_late_update_twice_at_once(world: World) -> None:
    quick, slow = world.enrol_many("quick", "slow")
    run = world.start_run(rounds=3, grace_seconds=0, late_updates="next_round")
    late = world.take(slow)
    world.deliver(quick)
    world.upload(late, slow)
    answers = world.race([lambda: world.submit(late, slow)] * 3)
    assert len(of(SubmissionReceipt, answers)) == 3
    assert len(set(answers)) == 1
    assert [event.data.get("late") for event in world.events(run.run_id)].count(True) == 1


def test_an_update_and_a_pause(world: World) -> None:
    for _ in range(3):
        device = world.enrol("a")
        run = world.start_run(device_ids=[device])
        assignment = world.take(device)
        world.upload(assignment, device)
        answers = world.race([lambda a=assignment, d=device: world.submit(a, d), pause(world, run)])
        assert not of(Exception, answers)
        assert world.statuses(run.run_id) == {"a": AssignmentStatus.SUBMITTED}
        resume(world, run)()
        assert world.round(run.run_id).status is RoundStatus.AGGREGATING


def test_an_update_and_a_rollback(world: World) -> None:
    """The update is of the round that is abandoned, so it never counts, whichever comes first."""
    for _ in range(3):
        device = world.enrol("a")
        run = world.start_run(rounds=3, device_ids=[device])
        world.deliver(device)
        world.finish_round()
        assignment = world.take(device)
        world.upload(assignment, device)
        answers = world.race([lambda a=assignment, d=device: world.submit(a, d), roll_back(world, run, 0)])
        assert isinstance(answers[0], SubmissionReceipt | RoundClosed)
        new = world.round(run.run_id, 2)
        assert (new.attempt, new.base_version) == (2, 0)
        assert world.call(updates.submitted_updates, new.round_id) == []


def test_the_sampling_deadline_pauses_once(world: World) -> None:
    world.enrol("a")
    run = world.start_run(sampling_deadline_seconds=10, too_few_devices="pause")
    world.wait(10)
    answers = world.race([lambda: world.call(rounds.close_due_rounds, world.now)] * 3)
    assert not of(Exception, answers)
    assert moves_to(world, run, RunStatus.PAUSED) == 1


def test_federations_are_created_and_joined_once_and_not_deleted_under_a_run(world: World) -> None:
    request = FederationCreate(name="north")
    answers = world.race([lambda: world.call(federations.create_federation, request, world.now)] * 3)
    assert len(of(Federation, answers)) == 1
    assert {error.code for error in of(DomainError, answers)} == {ErrorCode.NAME_TAKEN}
    device = world.enrol("a")
    answers = world.race([lambda: world.call(federations.add_device, "north", device, world.now)] * 3)
    assert answers == [None] * 3
    assert world.count(FederationDeviceRow) == 2
    for number in range(3):
        name = f"north-{number}"
        world.call(federations.create_federation, FederationCreate(name=name), world.now)
        answers = world.race(
            [
                lambda n=name: world.call(federations.delete_federation, n, world.now),
                lambda n=name: world.create_run(federation=n),
                lambda n=name: world.call(federations.add_device, n, device, world.now),
            ]
        )
        deleted = answers[0] is None
        codes = {error.code for error in of(DomainError, answers)}
        assert codes <= ({ErrorCode.FEDERATION_NOT_FOUND} if deleted else {ErrorCode.CONFLICT})
        assert isinstance(answers[1], Run) is not deleted
    with world.database.reading() as session:
        assert session.get(FederationRow, "default") is not None


def test_everything_at_once_leaves_one_round_and_counts_no_update_twice(world: World) -> None:
    """Operators, two devices of which one is slow, the sweep and a worker on one run; no deadlock, no other error."""
    quick, slow = world.enrol_many("quick", "slow")
    settings = {"grace_seconds": 0, "late_updates": "next_round", "max_staleness": 9, "rounds": 500}
    run = world.start_run(device_ids=[quick, slow], **settings)
    unexpected: list[BaseException] = []

    def repeat(action: Action) -> Action:
        def loop() -> None:
            for _ in range(12):
                try:
                    action()
                except DomainError as error:
                    if error.code in (ErrorCode.UNAVAILABLE, ErrorCode.INTERNAL_ERROR):
                        unexpected.append(error)

        return loop

    def work(device: str) -> None:
        assignment = world.poll(device)
        if assignment is not None:
            world.upload(assignment, device)
            world.submit(assignment, device)

    def sweep() -> None:
        world.call(rounds.close_due_rounds, world.now)
        world.call(rounds.mark_lost_assignments, world.now)

    def serve() -> None:
        job = world.claim(world.sent[-1])
        if job is not None:
            finish = {"aggregate_round": world.finish_aggregation, "co_tune_round": world.finish_co_tuning}
            world.call(finish.get(job.kind, world.finish_evaluation), job, "worker")

    def hold() -> None:
        pause(world, run)()
        resume(world, run)()

    def break_and_mend() -> None:
        fail(world, run)()
        retry(world, run)()

    actions: list[Action] = [lambda: work(quick), lambda: work(slow), sweep, serve, serve, hold, break_and_mend]
    answers = world.race([repeat(action) for action in [*actions, roll_back(world, run, 0)]])
    assert answers == [None] * len(answers)
    assert unexpected == []
    assert rounds_open(world, run) <= 1
    counted = [event.data["assignment_id"] for event in world.events(run.run_id) if event.data.get("to") == "counted"]
    assert len(counted) == len(set(counted))
