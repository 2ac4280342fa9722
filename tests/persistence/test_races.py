"""Real connections at the same moment: one wins, the other is told, nothing is done twice, nobody waits for ever."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from persistence import assignments, devices, enrolment, events, jobs, rounds, runs, traffic, updates
from persistence.errors import IllegalTransition, LeaseLost
from persistence.tables import AssignmentRow, DeviceRow, JobRow, RunRow, VersionRow
from persistence.transitions import move
from protocol.assignments import Assignment, PartReceipt, SubmissionReceipt
from protocol.devices import EnrolmentReceipt, EnrolmentRequest, EnrolmentTokenCreate, Heartbeat
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.statuses import AssignmentStatus, DeviceStatus, JobKind, PartKind, RoundStatus, RunStatus
from tests.persistence.world import PROFILE, World, sha, submission_of


def of(kind: type, answers: list[Any]) -> list[Any]:
    return [answer for answer in answers if isinstance(answer, kind)]


def test_two_movers_of_one_row(world: World) -> None:
    """Each reads the row in its own transaction before either writes; the old status in the WHERE decides."""
    for _ in range(5):
        run = world.create_run()
        both_have_read = threading.Barrier(2)

        def mover(to: RunStatus, run_id: str = run.run_id, meet: threading.Barrier = both_have_read) -> None:
            with world.database.reading() as session:
                row = session.get_one(RunRow, run_id)
                session.expunge(row)
            meet.wait()
            with world.database.transaction() as session:
                session.add(row)
                move(session, row, to, now=world.now)

        answers = world.race([lambda go=mover: go(RunStatus.STOPPED), lambda go=mover: go(RunStatus.FAILED)])
        assert len(of(IllegalTransition, answers)) == 1
        assert answers.count(None) == 1
        moves = [event.data["to"] for event in world.events(run.run_id) if event.type is EventType.RUN_STATUS_CHANGED]
        assert moves == [world.run(run.run_id).status]


def test_the_second_mover_waits_for_the_first_and_then_loses(world: World) -> None:
    """The first has moved and not committed when the second starts to move."""
    run = world.create_run()
    first_has_moved, answers = threading.Event(), list[Any]()

    def second() -> None:
        with world.database.reading() as session:
            row = session.get_one(RunRow, run.run_id)
            session.expunge(row)
        first_has_moved.set()
        try:
            with world.database.transaction() as session:
                session.add(row)
                move(session, row, RunStatus.STOPPED, now=world.now)
        except IllegalTransition as error:
            answers.append(error)

    thread = threading.Thread(target=second)
    with world.database.transaction() as session:
        move(session, session.get_one(RunRow, run.run_id), RunStatus.PREPARING, now=world.now)
        thread.start()
        assert first_has_moved.wait(10)
        time.sleep(0.1)  # Let it come to the write, where it must wait.
        assert thread.is_alive()
    thread.join(20)
    # It had read `pending`. Now the row is `preparing`, and that it may become `stopped` too does not help.
    assert [error.current for error in answers] == [RunStatus.PREPARING]
    assert world.run(run.run_id).status is RunStatus.PREPARING


def test_a_one_time_token_enrols_one_device(world: World) -> None:
    token = world.call(enrolment.create_token, EnrolmentTokenCreate(), world.now)
    request = EnrolmentRequest(token=token.token, name="a", profile=PROFILE)
    answers = world.race([lambda: world.call(enrolment.enrol, request, world.now)] * 4)
    assert len(of(EnrolmentReceipt, answers)) == 1
    assert {error.code for error in of(DomainError, answers)} == {ErrorCode.ENROLMENT_TOKEN_USED}
    assert world.count(DeviceRow) == 1


def test_a_device_that_polls_twice_gets_one_assignment(world: World) -> None:
    device = world.enrol("a")
    world.start_run()
    answers = world.race([lambda: world.poll(device)] * 4)
    assert len({answer.assignment_id for answer in of(Assignment, answers)}) == 1
    assert len(of(Assignment, answers)) == 4
    assert world.count(AssignmentRow) == 1


def test_a_device_is_given_what_its_other_request_was_given_a_moment_ago(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world.database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time: the other request cannot come between two looks")
    device = world.enrol("a")
    world.start_run()
    look, others = assignments._candidates, list[Any]()

    def look_late(*arguments: Any) -> list[str]:
        if not others:
            monkeypatch.setattr(assignments, "_candidates", look)
            others.append(world.poll(device))
        return look(*arguments)

    monkeypatch.setattr(assignments, "_candidates", look_late)
    answer = world.poll(device)
    assert answer is not None
    assert [answer.assignment_id] == [other.assignment_id for other in others]


def test_the_last_place_is_taken_once(world: World) -> None:
    ids = world.enrol_many("a", "b", "c", "d")
    world.start_run(max_updates=1)
    answers = world.race([lambda device=device: world.poll(device) for device in ids])
    assert len(of(Assignment, answers)) == 1
    assert answers.count(None) == 3


def test_a_job_is_claimed_once(world: World) -> None:
    world.create_run()
    job_id = world.sent[-1]
    answers = world.race([lambda owner=owner: world.claim(job_id, owner) for owner in "abcd"])
    assert len(of(jobs.JobRecord, answers)) == 1
    assert answers.count(None) == 3
    world.wait(21)
    answers = world.race([lambda owner=owner: world.claim(job_id, owner) for owner in "efgh"])
    assert [job.attempts for job in of(jobs.JobRecord, answers)] == [2]


def test_the_sweep_and_a_new_owner_meet_at_an_expired_lease(world: World) -> None:
    world.create_run()
    job = world.claim_newest("dead")
    world.wait(21)
    answers = world.race(
        [
            lambda: world.claim(job.job_id, "next"),
            lambda: world.call(jobs.due_for_sending, world.now, 10),
            lambda: world.call(jobs.renew, job.job_id, "dead", 20, world.now),
        ]
    )
    assert not of(Exception, answers)
    with world.database.reading() as session:
        row = session.get_one(JobRow, job.job_id)
    holders = {"next": isinstance(answers[0], jobs.JobRecord), "dead": answers[2]}
    assert sum(holders.values()) <= 1  # Only one believes that it holds the lease.
    assert row.owner in {None, *(owner for owner, holds in holders.items() if holds)}


def test_a_result_is_stored_once(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=1)
    world.deliver(device)
    job = world.claim_newest("one")
    answers = world.race([lambda: world.call(world.finish_aggregation, job, "one")] * 3)
    assert answers == [None] * 3
    world.wait(0)
    job = world.claim_newest("one")
    world.call(world.finish_co_tuning, job, "one")
    job = world.claim_newest("one")
    answers = world.race(
        [
            lambda: world.call(world.finish_evaluation, job, "one"),
            lambda: world.call(world.finish_evaluation, job, "one"),
            lambda: world.call(world.finish_evaluation, job, "another"),
        ]
    )
    assert [type(answer) for answer in answers] == [type(None), type(None), LeaseLost]
    assert world.count(VersionRow) == 2
    assert world.run(run.run_id).status is RunStatus.COMPLETED


def test_the_same_part_and_submission_twice_at_once(world: World) -> None:
    device, _other = world.enrol("a"), world.enrol("b")
    run = world.start_run(min_updates=2)
    assignment = world.take(device)
    part = (device, assignment.assignment_id, PartKind.LOGITS)
    answers = world.race([lambda: world.call(updates.record_part, *part, sha("x"), 10, world.now)] * 3)
    assert len(of(PartReceipt, answers)) == 3
    assert len(set(answers)) == 1
    other = world.race([lambda: world.call(updates.record_part, *part, sha("y"), 10, world.now)] * 2)
    assert {error.code for error in of(DomainError, other)} == {ErrorCode.UPDATE_CONFLICT}
    rest = (device, assignment.assignment_id, PartKind.ADAPTER_DELTA, sha(f"adapter_delta {device}"), 10, world.now)
    world.call(updates.record_part, *rest)
    submission = submission_of(assignment, device)
    parts = [submission.parts[0], submission.parts[1].model_copy(update={"sha256": sha("x")})]
    submission = submission.model_copy(update={"parts": parts})
    arguments = (device, assignment.assignment_id, submission, world.now)
    answers = world.race([lambda: world.call(updates.submit, *arguments)] * 3)
    assert len(of(SubmissionReceipt, answers)) == 3
    assert len(set(answers)) == 1
    assert [event.type for event in world.events(run.run_id)].count(EventType.UPDATE_SUBMITTED) == 1


def test_two_different_submissions_at_once(world: World) -> None:
    device, _other = world.enrol("a"), world.enrol("b")
    world.start_run("standalone", min_updates=2)
    assignment = world.take(device)

    def submit(num_examples: int) -> SubmissionReceipt:
        submission = submission_of(assignment, device, num_examples)
        return world.call(updates.submit, device, assignment.assignment_id, submission, world.now)

    answers = world.race([lambda: submit(1), lambda: submit(2)])
    assert len(of(SubmissionReceipt, answers)) == 1
    assert [error.code for error in of(DomainError, answers)] == [ErrorCode.UPDATE_CONFLICT]


def test_the_last_submissions_and_the_sweep_close_the_round_once(world: World) -> None:
    ids = world.enrol_many("a", "b", "c")
    run = world.start_run(min_updates=1, grace_seconds=60)
    taken = {device: world.take(device) for device in ids}
    for device, assignment in taken.items():
        world.upload(assignment, device)
    actions: list[Callable[[], Any]] = [lambda d=d, a=a: world.submit(a, d) for d, a in taken.items()]
    answers = world.race([*actions, *[lambda: world.call(rounds.close_due_rounds, world.now)] * 2])
    assert len(of(SubmissionReceipt, answers)) == 3
    assert not of(Exception, answers)
    shown = world.round(run.run_id)
    assert shown.status is RoundStatus.AGGREGATING
    assert world.sent.count(world.job_id(JobKind.AGGREGATE_ROUND, shown.round_id)) == 1


def test_an_update_and_the_closing_of_its_round(world: World) -> None:
    """Either it is in, or it is late; never both, and the worker sees what the device was told."""
    for _ in range(3):
        quick, slow = world.enrol_many("quick", "slow")
        run = world.start_run("standalone", min_updates=1, grace_seconds=60, device_ids=[quick, slow])
        assignment = world.take(slow)
        world.deliver(quick)
        world.wait(60)
        answers = world.race(
            [
                lambda a=assignment, d=slow: world.submit(a, d),
                lambda: world.call(rounds.close_due_rounds, world.now),
                lambda: world.call(rounds.mark_lost_assignments, world.now),
            ]
        )
        accepted = isinstance(answers[0], SubmissionReceipt)
        status = world.statuses(run.run_id)["slow"]
        assert status is (AssignmentStatus.SUBMITTED if accepted else AssignmentStatus.LATE)
        records = world.call(updates.submitted_updates, assignment.round_id)
        assert [record.device_id for record in records] == ([quick, slow] if accepted else [quick])


def test_bytes_are_counted_by_all(world: World) -> None:
    device = world.enrol("a")
    run = world.create_run()

    def add() -> None:
        for _ in range(5):
            world.call(traffic.add, run.run_id, device, "up", "logits", 100)

    assert world.race([add] * 4) == [None] * 4
    assert world.call(traffic.totals, run.run_id).up == {"logits": 2000}


def test_a_reader_of_the_feed_misses_nothing(world: World) -> None:
    """It asks for what came after the last one it saw, while others write: every event once, in order."""
    done = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while True:
            finished = done.is_set()
            with world.database.reading() as session:
                seen.extend(
                    event.sequence for event in events.list_events(session, run_id=None, after=seen[-1] if seen else 0)
                )
            if finished:
                return
            time.sleep(0.002)

    def write() -> None:
        for _ in range(8):
            with world.database.transaction() as session:
                for _ in range(3):
                    events.append(session, EventType.ROUND_METRICS, world.now)

    reader = threading.Thread(target=read)
    reader.start()
    answers = world.race([write] * 4)
    done.set()
    reader.join(30)
    assert answers == [None] * 4
    assert len(seen) == 4 * 8 * 3
    assert seen == sorted(set(seen))


def test_nobody_waits_for_ever(world: World) -> None:
    """Everything that locks, mixed, on few rows: no deadlock, no error but the ones that are meant."""
    ids = world.enrol_many("a", "b", "c", "d")
    run = world.start_run("standalone", rounds=50, min_updates=1, max_updates=2, grace_seconds=0)
    latest = time.monotonic() + 60
    enough = threading.Event()
    unexpected: list[BaseException] = []

    def repeat(action: Callable[[], Any]) -> Callable[[], None]:
        def loop() -> None:
            while not enough.is_set() and time.monotonic() < latest:
                try:
                    action()
                except DomainError as error:
                    if error.code in (ErrorCode.UNAVAILABLE, ErrorCode.INTERNAL_ERROR):
                        unexpected.append(error)

        return loop

    def work(device: str) -> None:
        assignment = world.poll(device)
        if assignment is not None:
            world.report(assignment, device, AssignmentStatus.TRAINING)
            world.submit(assignment, device)

    def be_alive(device: str) -> None:
        world.call(devices.record_heartbeat, device, Heartbeat(), world.now)
        world.call(devices.mark_silent_devices, world.now, 0)
        world.wait(0.2)

    def sweep() -> None:
        world.call(rounds.close_due_rounds, world.now)
        world.call(rounds.mark_lost_assignments, world.now)
        world.call(jobs.due_for_sending, world.now, 0)

    def serve() -> None:
        job = world.claim(world.sent[-1])
        if job is not None and job.round_id is not None:
            finish = {"aggregate_round": world.finish_aggregation, "co_tune_round": world.finish_co_tuning}
            world.call(finish.get(job.kind, world.finish_evaluation), job, "worker")
            if world.run(run.run_id).current_round > 2:
                enough.set()

    answers = world.race(
        [
            *(repeat(lambda device=device: work(device)) for device in ids[:3]),
            repeat(lambda: be_alive(ids[0])),
            repeat(sweep),
            repeat(serve),
        ]
    )
    assert answers == [None] * 6
    assert unexpected == []
    world.race(
        [
            lambda: world.call(devices.revoke_device, ids[0], world.now),
            lambda: world.call(runs.stop_run, run.run_id, "enough", world.now),
            lambda: world.poll(ids[0]),
            lambda: world.poll(ids[3]),
            lambda: world.call(assignments.next_assignment, ids[1], world.now, {}),
        ]
    )
    assert world.run(run.run_id).status in (RunStatus.STOPPED, RunStatus.COMPLETED, RunStatus.FAILED)
    counted = [event.data["assignment_id"] for event in world.events() if event.data.get("to") == "counted"]
    assert len(counted) == len(set(counted)) > 0


def test_a_revoked_device_that_slipped_in_is_found_by_the_sweep(world: World) -> None:
    """A revocation and an offer may cross. Here the device is revoked behind the back of its assignment."""
    device, _other = world.enrol("a"), world.enrol("b")
    run = world.start_run()
    world.take(device)
    with world.database.transaction() as session:
        move(session, session.get_one(DeviceRow, device), DeviceStatus.REVOKED, now=world.now)
    assert world.call(rounds.mark_lost_assignments, world.now) == 1
    assert world.statuses(run.run_id) == {"a": AssignmentStatus.LOST}
    assert world.round(run.run_id).devices[0].reason == "the device was revoked"
