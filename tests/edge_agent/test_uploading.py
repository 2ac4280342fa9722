"""Files in chunks from the agent's side, against the real API: what has arrived is not sent again, whatever happens."""

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import pytest

from edge_agent.client import CloudClient
from edge_agent.errors import CloudRefused, CloudUnavailable
from edge_agent.ledger import Ledger
from edge_agent.uploading import upload_file
from protocol.assignments import Assignment, Part, PartReceipt, PartUpload
from protocol.statuses import PartKind
from tests.cloud_api.running_api import RunningApi, delta_for, running_api, settings_in
from tests.cloud_api.test_message_uploads import VOCABULARY


@dataclass
class Sender:
    """An enrolled device with a file to send."""

    api: RunningApi
    credential: str
    ledger: Ledger
    assignment: Assignment
    content: bytes
    file: Path
    faults: list[str] = field(default_factory=list)
    """What the next chunks meet: `lost` (it never arrives), `unheard` (the answer does not), `` (nothing)."""
    sent: list[int] = field(default_factory=list)
    brought: list[int] = field(default_factory=list)
    """Sizes of the chunks that came with the beginning."""

    def part(self, **changed: object) -> Part:
        digest = sha256(self.content).hexdigest()
        part = Part(kind=PartKind.ADAPTER_DELTA, sha256=digest, size_bytes=len(self.content))
        return part.model_copy(update=changed)

    def upload(self, part: Part | None = None, *, at_once_bytes: int = 100, fresh: bool = False) -> PartReceipt:
        """As a process that has just started does; or, fresh, one that has just made the file."""
        now: Callable[[], datetime] = lambda: datetime.now(UTC)  # noqa: E731
        with FaultyClient(self.api.url, self.credential, self.ledger, threading.Event(), now=now) as client:
            client.sender = self
            return upload_file(
                client,
                self.assignment,
                part or self.part(),
                self.file,
                fresh=fresh,
                at_once_bytes=at_once_bytes,
                chunk_bytes=200,
            )


class FaultyClient(CloudClient):
    """The real client behind a bad connection."""

    sender: Sender

    def begin_upload(self, assignment: Assignment, part: Part, first_chunk: bytes = b"") -> PartUpload:
        self.sender.brought.append(len(first_chunk))
        return super().begin_upload(assignment, part, first_chunk)

    def send_chunk(self, assignment: Assignment, part: Part, upload_id: str, offset: int, chunk: bytes) -> PartUpload:
        fault = self.sender.faults.pop(0) if self.sender.faults else ""
        if fault == "lost":
            raise CloudUnavailable("lost")
        answer = super().send_chunk(assignment, part, upload_id, offset, chunk)
        self.sender.sent.append(offset)
        if fault == "unheard":
            raise CloudUnavailable("unheard")
        return answer


@pytest.fixture
def sender(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Sender]:
    server = tmp_path / "server"
    server.mkdir()
    shutil.copy(migrated_sqlite, server / "cotune.sqlite3")
    with running_api(settings_in(server, upload_chunk_bytes=100)) as api:
        device = api.enrol()
        api.running_run(device)
        assignment = device.poll()
        assert assignment is not None
        content, file = delta_for(assignment), tmp_path / "delta"
        file.write_bytes(content)
        ledger = Ledger(tmp_path / "ledger.jsonl", lambda: datetime.now(UTC))
        yield Sender(api, device.credential, ledger, assignment, content, file)
    shutil.rmtree(server)


def test_each_chunk_is_sent_once_and_every_byte_is_in_the_ledger(sender: Sender) -> None:
    receipt = sender.upload()
    assert (receipt.sha256, receipt.size_bytes) == (sha256(sender.content).hexdigest(), len(sender.content))
    assert sender.api.stored(sender.content)
    assert sender.sent == list(range(0, len(sender.content), 100))
    entries = list(sender.ledger.entries())
    assert [entry.sha256 for entry in entries] == [
        sha256(sender.content[offset : offset + 100]).hexdigest() for offset in sender.sent
    ]
    path = f"/v1/runs/{sender.assignment.run_id}/traffic"
    assert (
        sender.api.operator.get(path).json()["up"] == sender.ledger.totals() == {"adapter_delta": len(sender.content)}
    )


def test_a_file_that_was_never_tried_begins_with_its_first_chunk(sender: Sender) -> None:
    sender.faults = ["", "unheard"]
    with pytest.raises(CloudUnavailable) as caught:
        sender.upload(fresh=True)
    assert caught.value.progressed
    assert sender.upload().sha256 == sha256(sender.content).hexdigest()
    assert sender.brought == [200, 0]
    assert sender.sent == list(range(200, len(sender.content), 200))
    assert sender.ledger.totals() == {"adapter_delta": len(sender.content)}


@pytest.mark.parametrize("fault", ["lost", "unheard"])
def test_a_restart_after_a_cut_sends_only_what_is_missing(sender: Sender, fault: str) -> None:
    sender.faults = ["", "", fault]
    with pytest.raises(CloudUnavailable) as caught:
        sender.upload()
    assert caught.value.progressed
    before = list(sender.sent)
    sender.sent.clear()
    assert sender.upload().size_bytes == len(sender.content)
    assert before + sender.sent == list(range(0, len(sender.content), 100))
    assert sender.api.stored(sender.content)


def test_a_cut_at_the_first_chunk_has_brought_nothing_forward(sender: Sender) -> None:
    sender.faults = ["lost"]
    with pytest.raises(CloudUnavailable) as caught:
        sender.upload()
    assert not caught.value.progressed


def test_a_file_that_is_there_is_not_sent_again(sender: Sender) -> None:
    first = sender.upload()
    sender.sent.clear()
    assert sender.upload() == first
    assert sender.sent == []


def test_a_small_file_goes_at_once(sender: Sender) -> None:
    assert sender.upload(at_once_bytes=10_000).size_bytes == len(sender.content)
    assert sender.sent == []
    assert sender.ledger.totals() == {"adapter_delta": len(sender.content)}


def test_a_tokenizer_is_asked_about_first_and_sent_once_in_a_run(sender: Sender) -> None:
    device, content = sender.api.enrol("another"), VOCABULARY
    sender.api.running_run(device, strategy={"name": "fedmkt"})
    sender.credential, sender.content = device.credential, content
    sender.file.write_bytes(content)
    part = sender.part(kind=PartKind.SLM_VOCABULARY)
    for sent in ([0], []):
        assignment = device.poll()
        assert assignment is not None
        sender.assignment, sender.sent, sender.brought = assignment, [], []
        assert sender.upload(part, at_once_bytes=10_000, fresh=True).sha256 == part.sha256
        assert (sender.brought, sender.sent[:1]) == ([0], sent)
        path = f"/v1/assignments/{assignment.assignment_id}/refusal"
        device.http.post(path, json={"reason": "no", "code": "busy"})
        sender.api.operator.post(f"/v1/runs/{assignment.run_id}/retry")
    assert sender.ledger.totals() == {"slm_vocabulary": len(content)}


def test_a_file_that_was_spoilt_on_the_way_is_begun_again(sender: Sender) -> None:
    """The server finds out by the whole file's hash, and forgets the chunks; the next try starts at 0."""
    right = sender.content
    sender.file.write_bytes(right[:-1] + b"x")
    with pytest.raises(CloudUnavailable, match="SHA-256"):
        sender.upload()
    sender.file.write_bytes(right)
    sender.sent.clear()
    assert sender.upload().sha256 == sha256(right).hexdigest()
    assert sender.sent == list(range(0, len(right), 100))


def test_a_file_that_the_round_does_not_take_is_refused_with_its_first_chunk(sender: Sender) -> None:
    sender.content = b"not a safetensors file".ljust(1000)
    sender.file.write_bytes(sender.content)
    with pytest.raises(CloudRefused) as caught:
        sender.upload()
    assert caught.value.code == "not_safetensors"
    assert sender.sent == []
