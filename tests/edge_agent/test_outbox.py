"""The outbox: an update is there whole or not at all, and a damaged one is noticed."""

import hashlib
from pathlib import Path

import pytest

from edge_agent import durable
from edge_agent.cycle import RoundFiles
from edge_agent.outbox import Outbox, OutboxEntry
from protocol.assignments import Assignment, Part, Submission, SubmissionReceipt
from protocol.runs import DeviceMetrics
from protocol.statuses import PartKind
from tests.edge_agent.byte_trainer import ByteTrainer
from tests.edge_agent.conftest import make_assignment
from tests.edge_agent.fake_cloud import FakeCloud


def put(outbox: Outbox, assignment: Assignment) -> OutboxEntry:
    update = ByteTrainer().train(assignment, RoundFiles(None, None, None), None, lambda *_: None)

    def submission(parts: list[Part]) -> Submission:
        return Submission(base_sha256="0" * 64, num_examples=5, parts=parts, metrics=DeviceMetrics())

    return outbox.put(assignment, update.parts, update.write_state, submission)


def test_an_update_comes_back_as_it_was_put(tmp_path: Path, cloud: FakeCloud) -> None:
    assignment = make_assignment(cloud)
    entry = put(Outbox(tmp_path), assignment)
    (again,) = Outbox(tmp_path).pending()
    assert again == entry
    assert again.assignment == assignment
    assert [part.kind for part in again.submission.parts] == [PartKind.ADAPTER_DELTA, PartKind.LOGITS]
    for part in again.submission.parts:
        content = again.file(part).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (part.size_bytes, part.sha256)
    assert again.receipt is None
    assert (again.state_folder / "state.json").exists()


def test_a_receipt_is_kept_and_dropping_forgets_everything(tmp_path: Path, cloud: FakeCloud) -> None:
    outbox = Outbox(tmp_path)
    entry = put(outbox, make_assignment(cloud))
    receipt = SubmissionReceipt(
        assignment_id="asg_1", round_id="r", update_sha256="1" * 64, received_at="2026-01-01T00:00:00Z"
    )
    entry.keep_receipt(receipt)
    assert Outbox(tmp_path).pending()[0].receipt == receipt
    outbox.drop(entry)
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_update_is_swept_away(tmp_path: Path, cloud: FakeCloud) -> None:
    """What a kill before the rename leaves behind is no update, and is gone after the next start."""
    entry = put(Outbox(tmp_path), make_assignment(cloud))
    entry.folder.rename(tmp_path / f"asg_1{durable.UNFINISHED}")
    assert Outbox(tmp_path).pending() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["logits.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [b"", b"rot"])
def test_a_damaged_update_is_dropped(tmp_path: Path, cloud: FakeCloud, file: str, damage: bytes) -> None:
    outbox = Outbox(tmp_path)
    entry = put(outbox, make_assignment(cloud))
    (entry.folder / file).write_bytes(damage)
    assert outbox.pending() == []
    assert list(tmp_path.iterdir()) == []


def test_ids_from_the_server_cannot_leave_the_folder(tmp_path: Path, cloud: FakeCloud) -> None:
    outbox = Outbox(tmp_path / "outbox")
    for evil in ("../../escape", "/etc/cron.d/x", "a.new", ".", ""):
        entry = put(outbox, make_assignment(cloud, assignment_id=evil))
        assert entry.folder.parent == tmp_path / "outbox"
    assert len(outbox.pending()) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["outbox"]
