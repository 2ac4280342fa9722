"""What has come of a file: the rows behind an upload in chunks."""

from datetime import timedelta
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persistence import part_uploads, rounds, runs, updates
from persistence.blobs import StagedChunk
from persistence.part_uploads import EXPIRES_AFTER
from persistence.tables import AssignmentRow, PartUploadRow, UploadChunkRow
from persistence.transitions import move
from protocol.assignments import Assignment, PartUpload
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import AssignmentStatus, PartKind
from tests.persistence.world import World, sha

SIZE, CHUNK = 950, 100
EXAMPLES = count()


def begin(world: World, assignment: Assignment, content: str = "file") -> PartUpload:
    arguments = (assignment.assignment_id, PartKind.LOGITS, sha(content), SIZE, CHUNK, world.now)
    return world.call(part_uploads.begin, *arguments)[0]


def record(world: World, upload: PartUpload, offset: int, content: str = "") -> PartUpload:
    arguments = (upload.assignment_id, upload.kind, upload.upload_id, offset, sha(f"{offset}{content}"), world.now)
    return world.call(part_uploads.record_chunk, *arguments)


@pytest.fixture
def assignment(world: World) -> Assignment:
    device = world.enrol("a")
    world.start_run()
    return world.take(device)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offsets=st.lists(st.integers(0, 11).map(lambda number: number * CHUNK), max_size=30))
def test_whatever_comes_in_whatever_order_what_is_there_has_no_hole(
    world: World, assignment: Assignment, offsets: list[int]
) -> None:
    name = f"file {next(EXAMPLES)}"
    upload = begin(world, assignment, name)
    received = 0
    for offset in offsets:
        if offset > received or offset >= SIZE:
            with pytest.raises(DomainError) as caught:
                record(world, upload, offset)
            assert caught.value.code is ErrorCode.UPLOAD_OFFSET_MISMATCH
            continue
        upload = record(world, upload, offset)
        if offset == received:
            received = min(received + CHUNK, SIZE)
        assert upload.received_bytes == received
    assert begin(world, assignment, name).received_bytes == received
    if received == SIZE:
        arguments = (upload.assignment_id, upload.kind, upload.upload_id)
        file = world.call(part_uploads.received_file, *arguments)
        expected = [StagedChunk(at, min(CHUNK, SIZE - at), sha(str(at))) for at in range(0, SIZE, CHUNK)]
        assert list(file.chunks) == expected


def test_of_two_senders_of_a_place_one_is_recorded(world: World, assignment: Assignment) -> None:
    upload = begin(world, assignment)
    for offset in range(0, 300, CHUNK):
        both = [lambda text=text, at=offset: record(world, upload, at, text) for text in ("one", "two")]
        results = world.race(both)
        assert sorted(type(result).__name__ for result in results) == ["DomainError", "PartUpload"]
        (error,) = [result for result in results if isinstance(result, DomainError)]
        assert error.code is ErrorCode.UPDATE_CONFLICT
        same = world.race([lambda at=offset, text=text: record(world, upload, at, text) for text in ("one", "two")])
        assert sum(isinstance(result, PartUpload) for result in same) == 1
    assert begin(world, assignment).received_bytes == 300
    assert world.count(UploadChunkRow) == 3


def test_one_upload_is_begun_however_many_ask(world: World, assignment: Assignment) -> None:
    def ask(device: str) -> str | None:
        with world.database.transaction() as session:
            # As the API does: the admission locks the round.
            updates.admit_part(session, device, assignment.assignment_id, PartKind.LOGITS, world.now)
            arguments = (assignment.assignment_id, PartKind.LOGITS, sha("file"), SIZE, CHUNK, world.now)
            return part_uploads.begin(session, *arguments)[0].upload_id

    device = world.round(assignment.run_id).devices[0].device_id
    ids = world.race([lambda: ask(device)] * 4)
    assert len(set(ids)) == 1
    assert isinstance(ids[0], str)
    assert world.count(PartUploadRow) == 1


def test_idle_uploads_and_those_of_ended_assignments_are_forgotten(world: World, assignment: Assignment) -> None:
    upload = record(world, begin(world, assignment), 0)
    assert upload.expires_at == world.now + EXPIRES_AFTER
    assert world.call(part_uploads.forget_idle, world.now) == []
    later = world.now + EXPIRES_AFTER
    assert world.call(part_uploads.forget_idle, later - timedelta(seconds=1)) == []
    assert world.call(part_uploads.forget_idle, later) == [upload.upload_id]
    assert world.call(part_uploads.forget_idle, later) == []
    with pytest.raises(DomainError) as caught:
        record(world, upload, 100)
    assert caught.value.code is ErrorCode.UPLOAD_NOT_FOUND
    again = record(world, begin(world, assignment), 0)
    assert again.upload_id != upload.upload_id
    world.call(runs.stop_run, assignment.run_id, "enough", world.now)
    world.call(rounds.mark_lost_assignments, world.now)
    assert world.call(part_uploads.forget_idle, world.now) == [again.upload_id]
    assert world.count(UploadChunkRow) == world.count(PartUploadRow) == 0


@pytest.mark.parametrize("policy", ["next_round", "keep", "discard"])
def test_a_late_upload_is_kept_as_long_as_the_late_update_is_wanted(world: World, policy: str) -> None:
    quick, slow = world.enrol_many("quick", "slow")
    world.start_run(late_updates=policy, grace_seconds=0, rounds=6)
    assignment = world.take(slow)
    upload = record(world, begin(world, assignment), 0)
    world.deliver(quick)
    world.finish_round()
    for status in (AssignmentStatus.LOST, AssignmentStatus.LATE):
        with world.database.transaction() as session:
            move(session, session.get_one(AssignmentRow, assignment.assignment_id), status, now=world.now)
        forgotten = world.call(part_uploads.forget_idle, world.now)
        if policy == "discard":
            assert forgotten == [upload.upload_id]
            return
        assert forgotten == []
    world.upload(assignment, slow)
    world.submit(assignment, slow)
    assert world.call(part_uploads.forget_idle, world.now) == [upload.upload_id]
