"""Parts and submissions: twice the same, twice different, too late, incomplete, from the wrong base."""

from collections.abc import Callable
from typing import Any

import pytest

from persistence import artifacts, devices, rounds, run_moves, runs, updates
from persistence.errors import RoundClosed
from persistence.tables import UpdatePartRow
from protocol.assignments import Assignment, Part, Submission
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.runs import DeviceMetrics
from protocol.statuses import AssignmentStatus, PartKind, RoundStatus, RunStatus
from tests.persistence.world import START, TENSORS, World, parts_of, sha, submission_of


def record(world: World, assignment: Assignment, device: str, kind: PartKind, content: str = "x") -> Any:
    return world.call(updates.record_part, device, assignment.assignment_id, kind, sha(content), 10, world.now)


def submit(world: World, assignment: Assignment, device: str, submission: Submission) -> Any:
    return world.call(updates.submit, device, assignment.assignment_id, submission, world.now)


def test_a_part_comes_twice(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    assignment = world.take(device)
    first = record(world, assignment, device, PartKind.LOGITS)
    world.wait(5)
    assert record(world, assignment, device, PartKind.LOGITS) == first
    assert (first.received_at, first.size_bytes, first.sha256) == (START, 10, sha("x"))
    assert world.statuses(run.run_id) == {"a": AssignmentStatus.UPLOADING}
    assert world.round(run.run_id).status is RoundStatus.COLLECTING
    kept = world.call(artifacts.get, sha("x"))
    assert (kept.kind, kept.run_id, kept.size_bytes) == ("logits", run.run_id, 10)
    with pytest.raises(DomainError) as caught:
        record(world, assignment, device, PartKind.LOGITS, "other")
    assert caught.value.code is ErrorCode.UPDATE_CONFLICT
    assert (caught.value.expected, caught.value.received) == (sha("x"), sha("other"))
    assert world.count(UpdatePartRow) == 1


def test_a_part_that_the_strategy_does_not_have(world: World) -> None:
    device = world.enrol("a")
    world.start_run("standalone")
    assignment = world.take(device)
    with pytest.raises(DomainError, match="takes no files, not logits") as caught:
        record(world, assignment, device, PartKind.LOGITS)
    assert caught.value.code is ErrorCode.INVALID_FIELD
    with pytest.raises(DomainError) as caught:
        world.call(updates.admit_part, device, assignment.assignment_id, PartKind.LOGITS, world.now)
    assert caught.value.code is ErrorCode.INVALID_FIELD


def test_admission_tells_what_a_part_must_agree_with(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    assignment = world.take(device)
    arguments = (device, assignment.assignment_id, PartKind.ADAPTER_DELTA, world.now)
    admission = world.call(updates.admit_part, *arguments)
    assert (admission.run_id, admission.round_id) == (run.run_id, assignment.round_id)
    assert admission.base_sha256 == sha("adapter")
    assert admission.probe_set_sha256 == sha("probe_set")
    assert admission.proxy_manifest_sha256 == sha("proxy_base")
    assert admission.expected_tensors == TENSORS
    assert world.call(updates.expected_tensors, assignment.round_id) == TENSORS
    logits = world.call(updates.admit_part, device, assignment.assignment_id, PartKind.LOGITS, world.now)
    assert logits.expected_tensors is None
    world.upload(assignment, device)
    world.submit(assignment, device)
    assert world.call(updates.admit_part, *arguments) == admission  # A repeat must get as far as its receipt.


def look(world: World, assignment: Assignment, device: str, kind: PartKind = PartKind.ADAPTER_DELTA) -> Any:
    with world.database.reading() as session:
        return updates.look_at_part(session, device, assignment.assignment_id, kind, world.now)


def test_a_look_says_what_admission_says_while_a_round_is_open(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(min_updates=2)
    assignment = world.take(device)
    admission = world.call(updates.admit_part, device, assignment.assignment_id, PartKind.ADAPTER_DELTA, world.now)
    assert look(world, assignment, device) == admission
    world.upload(assignment, device)
    assert look(world, assignment, device) == admission
    world.call(run_moves.pause_run, run.run_id, "a look", world.now)
    assert look(world, assignment, device) == admission
    world.call(run_moves.resume_run, run.run_id, world.now)
    world.submit(assignment, device)
    world.wait(10**6)
    assert look(world, assignment, device) == admission  # A repeat must get as far as its receipt.


def test_a_look_leaves_to_admission_what_has_to_be_remembered(world: World) -> None:
    device, other = world.enrol("a"), world.enrol("b")
    run = world.start_run(min_updates=2)
    assignment, stopped = world.take(device), world.take(other)
    before = world.snapshot()
    with pytest.raises(DomainError) as caught:
        look(world, assignment, other)
    assert caught.value.code is ErrorCode.ASSIGNMENT_NOT_FOUND
    world.wait(10**6)
    assert look(world, assignment, device) is None  # The deadline has passed, and nobody has closed the round.
    assert world.snapshot() == before
    world.call(runs.stop_run, run.run_id, "no", world.now)
    assert look(world, stopped, other) is None
    with pytest.raises(RoundClosed):
        world.call(updates.admit_part, other, stopped.assignment_id, PartKind.ADAPTER_DELTA, world.now)


def test_an_update_is_submitted_twice(world: World) -> None:
    device, _other = world.enrol("a"), world.enrol("b")
    run = world.start_run(min_updates=2)
    assignment = world.take(device)
    world.upload(assignment, device)
    first = world.submit(assignment, device)
    before = world.snapshot()
    world.wait(5)
    assert world.submit(assignment, device) == first
    assert world.snapshot() == before
    with pytest.raises(DomainError) as caught:
        submit(world, assignment, device, submission_of(assignment, device, num_examples=41))
    assert caught.value.code is ErrorCode.UPDATE_CONFLICT
    assert world.snapshot() == before
    shown = world.round(run.run_id).devices[0]
    assert (shown.status, shown.num_examples, shown.submitted_at) == (AssignmentStatus.SUBMITTED, 40, START)
    assert DeviceMetrics.model_validate(shown.metrics).losses == {"slm": 2.5}
    assert [event.type for event in world.events(run.run_id)].count(EventType.UPDATE_SUBMITTED) == 1


def test_the_same_update_gets_its_receipt_also_when_the_round_is_over(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=1)
    assignment = world.take(device)
    world.upload(assignment, device)
    receipt = world.submit(assignment, device)
    world.finish_round()
    assert world.run(run.run_id).status is RunStatus.COMPLETED
    before = world.snapshot()
    assert world.submit(assignment, device) == receipt
    world.upload(assignment, device)
    assert world.snapshot() == before


def test_missing_extra_and_wrong_parts(world: World) -> None:
    device = world.enrol("a")
    world.start_run()
    assignment = world.take(device)
    whole = submission_of(assignment, device)
    delta, logits = whole.parts
    other = Part(kind=PartKind.LOGITS, sha256=sha("never uploaded"), size_bytes=10)
    longer = logits.model_copy(update={"size_bytes": 11})
    record(world, assignment, device, PartKind.ADAPTER_DELTA, f"{PartKind.ADAPTER_DELTA} {device}")
    before = world.snapshot()
    for parts in ([], [delta], [delta, delta], [delta, logits], [delta, logits, logits]):
        with pytest.raises(DomainError) as caught:
            submit(world, assignment, device, whole.model_copy(update={"parts": parts}))
        assert caught.value.code is ErrorCode.UPDATE_INCOMPLETE
    record(world, assignment, device, PartKind.LOGITS, f"{PartKind.LOGITS} {device}")
    for parts in ([delta, other], [delta, longer]):
        with pytest.raises(DomainError, match="the uploaded parts are") as caught:
            submit(world, assignment, device, whole.model_copy(update={"parts": parts}))
        assert caught.value.code is ErrorCode.UPDATE_INCOMPLETE
    assert before["assignments"] == world.snapshot()["assignments"]
    submit(world, assignment, device, whole.model_copy(update={"parts": [logits, delta]}))  # In any order.


@pytest.mark.parametrize("base", [None, sha("another adapter")])
def test_an_update_from_another_base(world: World, base: str | None) -> None:
    device = world.enrol("a")
    world.start_run()
    assignment = world.take(device)
    world.upload(assignment, device)
    with pytest.raises(DomainError, match="round 1 starts from adapter") as caught:
        submit(world, assignment, device, submission_of(assignment, device).model_copy(update={"base_sha256": base}))
    assert caught.value.code is ErrorCode.WRONG_BASE_VERSION
    assert (caught.value.expected, caught.value.received) == (sha("adapter"), base)


def test_a_strategy_without_files_submits_numbers_only(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run("standalone", rounds=1)
    world.deliver(device)
    world.finish_round()
    assert world.run(run.run_id).status is RunStatus.COMPLETED


@pytest.mark.parametrize("after_the_sweep", [False, True])
@pytest.mark.parametrize("what", ["part", "submission", "admission"])
def test_what_comes_after_the_round_has_closed_is_late(world: World, what: str, after_the_sweep: bool) -> None:
    slow, quick = world.enrol_many("slow", "quick")
    run = world.start_run(min_updates=1, grace_seconds=0)
    assignment = world.take(slow)
    if what == "submission":
        world.upload(assignment, slow)
    world.deliver(quick)
    if after_the_sweep:
        assert world.call(rounds.mark_lost_assignments, world.now) == 1
        assert world.statuses(run.run_id)["slow"] is AssignmentStatus.LOST
    before = world.snapshot()
    send: dict[str, Callable[[], object]] = {
        "part": lambda: record(world, assignment, slow, PartKind.LOGITS),
        "submission": lambda: world.submit(assignment, slow),
        "admission": lambda: world.call(updates.admit_part, slow, assignment.assignment_id, PartKind.LOGITS, world.now),
    }
    for _ in range(2):
        with pytest.raises(RoundClosed, match="is aggregating and takes no more updates") as caught:
            send[what]()
        assert caught.value.code is ErrorCode.ROUND_CLOSED
        assert world.statuses(run.run_id) == {"slow": AssignmentStatus.LATE, "quick": AssignmentStatus.SUBMITTED}
    after = world.snapshot()
    assert {name for name in before if before[name] != after[name]} == {"assignments"}
    assert len(world.call(updates.submitted_updates, assignment.round_id)) == 1


def test_an_update_for_a_stopped_run_is_late(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    assignment = world.take(device)
    world.upload(assignment, device)
    world.call(runs.stop_run, run.run_id, "no", world.now)
    with pytest.raises(RoundClosed, match="is abandoned"):
        world.submit(assignment, device)
    assert world.statuses(run.run_id) == {"a": AssignmentStatus.LATE}


def test_the_deadline_counts_even_before_the_sweep_has_seen_it(world: World) -> None:
    in_time, late = world.enrol_many("in time", "late")
    run = world.start_run(min_updates=1, grace_seconds=1000, round_deadline_seconds=100)
    assignment = world.take(late)
    world.upload(assignment, late)
    world.deliver(in_time)
    world.wait(100)
    with pytest.raises(RoundClosed):
        world.submit(assignment, late)
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING
    assert world.statuses(run.run_id) == {"in time": AssignmentStatus.SUBMITTED, "late": AssignmentStatus.LATE}


def test_a_refused_assignment_takes_nothing_more(world: World) -> None:
    device, _other = world.enrol("a"), world.enrol("b")
    run = world.start_run(min_updates=2)
    assignment = world.deliver(device)
    arguments = (assignment.assignment_id, ErrorCode.NON_FINITE_VALUES, "lora_A has 3 NaN", world.now)
    world.call(updates.reject_update, *arguments)
    world.call(updates.reject_update, *arguments)
    shown = world.round(run.run_id).devices[0]
    assert (shown.status, shown.reason) == (AssignmentStatus.REJECTED, "non_finite_values: lora_A has 3 NaN")
    assert [event.type for event in world.events()].count(EventType.UPDATE_REJECTED) == 1
    assert world.call(updates.submitted_updates, assignment.round_id) == []
    assert world.submit(assignment, device)  # The receipt stays what it was: the update was received.
    with pytest.raises(DomainError) as caught:
        record(world, assignment, device, PartKind.LOGITS, "another")
    assert caught.value.code is ErrorCode.UPDATE_CONFLICT


@pytest.mark.parametrize("what", ["part", "submission"])
def test_a_device_that_was_revoked_while_it_sent_something_is_refused(world: World, what: str) -> None:
    """It was who it said when the bytes began to come; the round waits for others."""
    world.start_run(min_updates=2)
    device, _ = world.enrol_many("a", "b")
    assignment = world.take(device)
    if what == "submission":
        world.upload(assignment, device)
    world.call(devices.revoke_device, device, world.now)
    parts = world.count(UpdatePartRow)
    with pytest.raises(DomainError) as refused:
        world.upload(assignment, device) if what == "part" else world.submit(assignment, device)
    assert refused.value.code is ErrorCode.DEVICE_REVOKED
    assert world.statuses(assignment.run_id) == {"a": AssignmentStatus.LOST}
    assert world.count(UpdatePartRow) == parts


def test_only_a_submitted_update_can_be_rejected(world: World) -> None:
    device = world.enrol("a")
    world.start_run()
    assignment = world.take(device)
    with pytest.raises(DomainError, match="only a submitted update") as caught:
        world.call(updates.reject_update, assignment.assignment_id, ErrorCode.NON_FINITE_VALUES, "x", world.now)
    assert caught.value.code is ErrorCode.ILLEGAL_TRANSITION
    with pytest.raises(DomainError) as caught:
        world.call(updates.reject_update, "asg_0", ErrorCode.NON_FINITE_VALUES, "x", world.now)
    assert caught.value.code is ErrorCode.ASSIGNMENT_NOT_FOUND


def test_updates_are_read_in_the_order_of_the_devices(world: World) -> None:
    devices = world.enrol_many("a", "b", "c", "d")
    world.start_run(min_updates=4)
    for device in (devices[2], devices[0], devices[3], devices[1]):
        world.wait(1)
        assignment = world.deliver(device)
    records = world.call(updates.submitted_updates, assignment.round_id)
    assert [record.device_id for record in records] == devices
    for update in records:
        parts = parts_of(assignment, update.device_id)
        assert update.parts == {part.kind: part.sha256 for part in parts}
        assert update.num_examples == 40
        assert update.metrics["losses"] == {"slm": 2.5}
    world.aggregate()
    assert world.call(updates.submitted_updates, assignment.round_id) == records  # Counted, for the later stages.


def test_metrics_that_are_not_finite_do_not_break_the_database(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run("standalone")
    assignment = world.take(device)
    metrics = DeviceMetrics(losses={"slm": float("nan")}, seconds_by_stage={"training": float("inf")})
    submission = submission_of(assignment, device).model_copy(update={"metrics": metrics})
    receipt = submit(world, assignment, device, submission)
    assert submit(world, assignment, device, submission) == receipt
    assert world.round(run.run_id).devices[0].metrics["losses"] == {"slm": None}


def test_a_quarantined_update_keeps_its_files_and_its_receipt_and_is_final(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(late_updates="next_round")
    assignment = world.deliver(device)
    receipt = submit(world, assignment, device, submission_of(assignment, device))
    arguments = (assignment.assignment_id, ErrorCode.NORM_OUTLIER, "far from the others", world.now)
    world.call(updates.quarantine_update, *arguments)
    world.call(updates.quarantine_update, *arguments)
    (shown,) = world.round(run.run_id).devices
    assert (shown.status, shown.reason) == (AssignmentStatus.QUARANTINED, "norm_outlier: far from the others")
    assert [event.type for event in world.events()].count(EventType.UPDATE_QUARANTINED) == 1
    outcome = world.call(updates.outcome, device, assignment.assignment_id)
    assert (outcome.status, outcome.receipt) == (AssignmentStatus.QUARANTINED, receipt)
    assert submit(world, assignment, device, submission_of(assignment, device)) == receipt
    assert world.call(updates.submitted_updates, shown_round(world, run.run_id)) == []
    with pytest.raises(DomainError, match="quarantined") as caught:
        world.call(updates.reject_update, *arguments)
    assert caught.value.code is ErrorCode.ILLEGAL_TRANSITION
    assert world.count(UpdatePartRow) == 2
    with pytest.raises(DomainError, match="quarantined: norm_outlier") as caught:
        world.report(assignment, device, AssignmentStatus.TRAINING)
    assert caught.value.code is ErrorCode.ILLEGAL_TRANSITION


def shown_round(world: World, run_id: str) -> str:
    return world.round(run_id).round_id
