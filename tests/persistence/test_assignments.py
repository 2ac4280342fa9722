"""A device asks for work, reports, and refuses."""

import math

import pytest

from persistence import assignments, devices, rounds, runs, updates
from persistence.tables import AssignmentRow
from protocol.assignments import AssignmentRefusal
from protocol.devices import Heartbeat
from protocol.errors import DomainError, ErrorCode
from protocol.part_sizes import most_delta_bytes
from protocol.runs import RunCreate
from protocol.safetensors_header import TensorInfo
from protocol.statuses import AssignmentStatus, PartKind, RoundStatus, RunStatus
from tests.persistence.world import LIMITS, PROFILE, World, sha

REFUSAL = AssignmentRefusal(reason="needs 9 GB, has 4 GB: my secret text", code="out_of_memory")


def test_an_assignment_holds_all_that_the_device_needs(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run(rounds=3, seed=11, round_deadline_seconds=600)
    got = world.take(device)
    assert (got.run_id, got.run_name, got.round_number, got.rounds, got.seed) == (run.run_id, "run", 1, 3, 11)
    assert got.status is AssignmentStatus.OFFERED
    assert got.strategy.name == "co_plms"
    assert [ref.sha256 if ref else None for ref in (got.proxy_manifest, got.adapter, got.probe_set)] == [
        sha("proxy_base"),
        sha("adapter"),
        sha("probe_set"),
    ]
    assert got.uploads == [PartKind.ADAPTER_DELTA, PartKind.LOGITS]
    assert got.upload_limits == LIMITS
    assert got.deadline_at == world.round(run.run_id).deadline_at
    assert (got.evaluate_before, got.evaluate_after) == (True, False)
    assert world.call(assignments.get_assignment, device, got.assignment_id, LIMITS) == got


DECLARED = {"name": "co_plms", "device_ranks": "declared", "aggregation": "exact_svd", "proxy_lora": {"rank": 8}}


def declare(world: World, device: str, rank: int | None) -> None:
    heartbeat = Heartbeat(profile=PROFILE.model_copy(update={"max_adapter_rank": rank}))
    world.call(devices.record_heartbeat, device, heartbeat, world.now)


def start_with_ranks(world: World, strategy: dict[str, object]) -> None:
    values = {"name": "run", "strategy": strategy, "rounds": 1, "llm": "llm", "public_data": "public"}
    run = world.call(runs.create_run, RunCreate.model_validate({**values, "min_updates": 3}), world.now)
    world.prepare(run.run_id)


def test_a_device_gets_the_rank_that_it_declares_and_keeps_it_for_the_round(world: World) -> None:
    phone, tablet, server = world.enrol_many("phone", "tablet", "server")
    declare(world, phone, 2)
    declare(world, tablet, 64)
    start_with_ranks(world, DECLARED)
    got = world.take(phone)
    assert [got.adapter_rank, world.take(tablet).adapter_rank, world.take(server).adapter_rank] == [2, None, None]
    declare(world, phone, 4)
    assert world.take(phone).adapter_rank == 2
    assert world.call(assignments.get_assignment, phone, got.assignment_id, LIMITS).adapter_rank == 2
    admission = world.call(updates.admit_part, phone, got.assignment_id, PartKind.ADAPTER_DELTA, world.now)
    assert admission.expected_tensors == {"layer.lora_A.weight": TensorInfo("F32", (2, 16))}
    assert admission.most_bytes == most_delta_bytes(admission.expected_tensors)
    world.upload(got, phone)
    world.submit(got, phone)
    assert [each.adapter_rank for each in world.call(updates.submitted_updates, got.round_id)] == [2]


def test_a_run_of_one_rank_asks_every_device_for_it(world: World) -> None:
    phone = world.enrol("phone")
    declare(world, phone, 2)
    start_with_ranks(world, {"name": "co_plms"})
    assert world.take(phone).adapter_rank is None


def test_a_strategy_without_a_proxy_names_no_files(world: World) -> None:
    device = world.enrol("a")
    world.start_run("standalone", rounds=1, llm=None, public_data=None)
    got = world.take(device)
    assert (got.proxy_manifest, got.adapter, got.probe_set) == (None, None, None)
    assert (got.uploads, got.upload_limits) == ([], {})
    assert (got.evaluate_before, got.evaluate_after) == (True, True)


def test_asking_again_gives_the_same_assignment(world: World) -> None:
    device = world.enrol("a")
    world.start_run()
    first = world.take(device)
    world.report(first, device, AssignmentStatus.TRAINING)
    again = world.take(device)
    assert again.assignment_id == first.assignment_id
    assert again.status is AssignmentStatus.TRAINING
    assert world.count(AssignmentRow) == 1


def test_there_is_no_work_without_an_open_round(world: World) -> None:
    device = world.enrol("a")
    assert world.poll(device) is None
    run = world.create_run()
    assert world.poll(device) is None
    world.prepare(run.run_id)
    assert world.poll(device) is not None


def test_what_is_delivered_is_not_given_again(world: World) -> None:
    device, _other = world.enrol("a"), world.enrol("b")
    world.start_run(min_updates=2)
    world.deliver(device)
    assert world.poll(device) is None


def test_only_the_devices_of_the_run(world: World) -> None:
    meant, other = world.enrol("meant"), world.enrol("other")
    world.start_run(device_ids=[meant])
    assert world.poll(other) is None
    assert world.poll(meant) is not None


def test_no_more_devices_than_max_updates(world: World) -> None:
    a, b, c = world.enrol_many("a", "b", "c")
    world.start_run(min_updates=1, max_updates=2)
    first = world.take(a)
    world.take(b)
    assert world.poll(c) is None
    world.call(assignments.refuse_assignment, a, first.assignment_id, REFUSAL, world.now)
    assert world.poll(c) is not None  # The place is free again.
    assert world.poll(a) is None  # Who has refused is not asked again.


def test_the_oldest_run_comes_first_and_unfinished_work_before_new(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    old = world.start_run(name="old", min_updates=2)
    world.wait(1)
    new = world.start_run(name="new", min_updates=2)
    assert world.take(a).run_id == old.run_id
    world.deliver(b)
    assert world.take(b).run_id == new.run_id
    assert world.take(a).run_id == old.run_id


def test_after_the_deadline_nothing_is_offered(world: World) -> None:
    device, other = world.enrol("a"), world.enrol("b")
    world.start_run(round_deadline_seconds=100)
    world.take(device)
    world.wait(100)
    assert world.poll(device) is None
    assert world.poll(other) is None


def test_a_long_poll_can_look_without_writing(world: World) -> None:
    a, b = world.enrol_many("a", "b")

    def waits(device: str) -> bool:
        with world.database.reading() as session:
            return assignments.work_waits(session, device, world.now)

    assert not waits(a)
    world.start_run(min_updates=2)
    assert waits(a)
    assignment = world.take(a)
    assert waits(a)  # It is not delivered.
    world.upload(assignment, a)
    world.submit(assignment, a)
    assert not waits(a)
    assert waits(b)


def test_progress_only_moves_forward(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    assignment = world.take(device)
    assert world.round(run.run_id).status is RoundStatus.OPEN
    assert world.report(assignment, device, AssignmentStatus.ACCEPTED) is AssignmentStatus.ACCEPTED
    assert world.round(run.run_id).status is RoundStatus.COLLECTING
    progress = {"stage": "mutual_learning", "step": 3, "steps": 60, "losses": {"slm": 2.0, "proxy": math.nan}}
    assert world.report(assignment, device, AssignmentStatus.TRAINING, **progress) is AssignmentStatus.TRAINING
    shown = world.round(run.run_id).devices[0]
    assert (shown.stage, shown.step, shown.steps, shown.losses) == ("mutual_learning", 3, 60, {"slm": 2.0})
    # The device was killed and starts again.
    restarted = {"stage": "domain_tuning", "step": 0, "steps": 20}
    assert world.report(assignment, device, AssignmentStatus.ACCEPTED, **restarted) is AssignmentStatus.TRAINING
    shown = world.round(run.run_id).devices[0]
    assert (shown.stage, shown.step, shown.losses) == ("domain_tuning", 0, {})
    assert world.report(assignment, device, AssignmentStatus.UPLOADING) is AssignmentStatus.UPLOADING


def test_repeated_progress_writes_no_event(world: World) -> None:
    device = world.enrol("a")
    run = world.start_run()
    assignment = world.take(device)
    world.report(assignment, device, AssignmentStatus.TRAINING, step=1)
    before = len(world.events(run.run_id))
    world.report(assignment, device, AssignmentStatus.TRAINING, step=2)
    assert len(world.events(run.run_id)) == before


def test_progress_after_submission_is_answered_and_ignored(world: World) -> None:
    device, _other = world.enrol("a"), world.enrol("b")
    run = world.start_run(min_updates=2)
    assignment = world.deliver(device)
    before = world.snapshot()
    assert world.report(assignment, device, AssignmentStatus.UPLOADING) is AssignmentStatus.SUBMITTED
    assert world.snapshot() == before
    assert world.statuses(run.run_id) == {"a": AssignmentStatus.SUBMITTED}


def test_progress_in_a_closed_round_says_so(world: World) -> None:
    slow, quick = world.enrol_many("slow", "quick")
    run = world.start_run(min_updates=1, grace_seconds=0)
    assignment = world.take(slow)
    world.deliver(quick)
    assert world.round(run.run_id).status is RoundStatus.AGGREGATING
    for _ in range(2):
        with pytest.raises(DomainError, match="too late") as caught:
            world.report(assignment, slow, AssignmentStatus.TRAINING)
        assert caught.value.code is ErrorCode.ROUND_CLOSED
        world.call(rounds.mark_lost_assignments, world.now)
    assert world.statuses(run.run_id)["slow"] is AssignmentStatus.LOST


def test_another_devices_assignment_does_not_exist_for_this_one(world: World) -> None:
    mine, yours = world.enrol("mine"), world.enrol("yours")
    world.start_run()
    assignment = world.take(yours)
    with pytest.raises(DomainError) as caught:
        world.report(assignment, mine, AssignmentStatus.TRAINING)
    assert caught.value.code is ErrorCode.ASSIGNMENT_NOT_FOUND
    with pytest.raises(DomainError) as caught:
        world.call(assignments.get_assignment, mine, assignment.assignment_id, LIMITS)
    assert caught.value.code is ErrorCode.ASSIGNMENT_NOT_FOUND


def test_a_refusal_is_kept_for_the_operator_and_not_on_the_feed(world: World) -> None:
    device, _other = world.enrol("a"), world.enrol("b")
    run = world.start_run()
    assignment = world.take(device)
    for _ in range(2):
        status = world.call(assignments.refuse_assignment, device, assignment.assignment_id, REFUSAL, world.now).status
        assert status is AssignmentStatus.REJECTED
    shown = world.round(run.run_id)
    assert "my secret text" in (shown.devices[0].reason or "")
    assert shown.status is RoundStatus.COLLECTING
    assert "secret" not in repr(world.events())
    assert "out_of_memory" in repr(world.events())
    with pytest.raises(DomainError, match="rejected") as caught:
        world.report(assignment, device, AssignmentStatus.TRAINING)
    assert caught.value.code is ErrorCode.ILLEGAL_TRANSITION


def test_a_refusal_code_with_other_words_is_not_on_the_feed(world: World) -> None:
    device = world.enrol("a")
    world.start_run()
    assignment = world.take(device)
    refusal = AssignmentRefusal(reason="x", code="patient 4711 said no")
    world.call(assignments.refuse_assignment, device, assignment.assignment_id, refusal, world.now)
    assert "4711" not in repr(world.events())


def test_what_is_submitted_cannot_be_refused(world: World) -> None:
    device, _other = world.enrol("a"), world.enrol("b")
    world.start_run(min_updates=2)
    assignment = world.deliver(device)
    with pytest.raises(DomainError) as caught:
        world.call(assignments.refuse_assignment, device, assignment.assignment_id, REFUSAL, world.now)
    assert caught.value.code is ErrorCode.ILLEGAL_TRANSITION


def test_when_all_named_devices_refuse_the_run_does_not_wait_for_its_deadline(world: World) -> None:
    a, b = world.enrol_many("a", "b")
    run = world.start_run(min_updates=2, device_ids=[a, b])
    world.deliver(a)
    assignment = world.take(b)
    world.call(assignments.refuse_assignment, b, assignment.assignment_id, REFUSAL, world.now)
    shown = world.run(run.run_id)
    assert (shown.status, shown.error_code) == (RunStatus.FAILED, ErrorCode.TOO_FEW_UPDATES)
    assert shown.status_reason == (
        "round 1 has 1 of the 2 updates it needs and no other device of the run can still send one: "
        "without an update: b (rejected)"
    )


def test_evaluation_before_is_asked_until_the_device_has_delivered(world: World) -> None:
    early, late = world.enrol_many("early", "late")
    world.start_run(rounds=3, min_updates=1, grace_seconds=0)
    world.deliver(early)
    world.finish_round()
    assert world.take(early).evaluate_before is False
    assert world.take(late).evaluate_before is True


def test_polling_for_nothing_costs_three_statements(world: World) -> None:
    """It is what most devices do most of the time."""
    from sqlalchemy import event

    device = world.enrol("a")
    statements: list[str] = []
    event.listen(world.database.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    world.poll(device)
    assert len([text for text in statements if not text.startswith("BEGIN")]) == 3
    assert world.call(devices.get_device, device).activity == "idle"
