"""Updates that are trained and not yet acknowledged, on disk.

    outbox/<assignment id>/manifest.json                 the assignment, the submission, and so the hash of every part
    outbox/<assignment id>/<part kind>.safetensors       what will be uploaded
    outbox/<assignment id>/state/                        what will be the local state; never uploaded
    outbox/<assignment id>/receipt.json                  once the server has answered

A folder gets its name only when everything in it is durable: that is the moment at which a round counts as trained. A
kill before it costs the training, which is repeated with the same result; a kill after it costs nothing.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import BaseModel

from assets.atomic import write_atomically
from edge_agent import durable
from protocol.assignments import Assignment, Part, Submission, SubmissionReceipt
from protocol.statuses import PartKind

MANIFEST_FILE = "manifest.json"
RECEIPT_FILE = "receipt.json"
STATE_FOLDER = "state"

log = structlog.get_logger(__name__)


class OutboxManifest(BaseModel):
    """`manifest.json`."""

    assignment: Assignment
    submission: Submission


@dataclass(frozen=True)
class OutboxEntry:
    """One update on disk."""

    folder: Path
    assignment: Assignment
    submission: Submission

    def file(self, part: Part) -> Path:
        """Return the file of a part."""
        return self.folder / _file_name(part.kind)

    @property
    def state_folder(self) -> Path:
        """The local state that becomes current with this update."""
        return self.folder / STATE_FOLDER

    @property
    def receipt(self) -> SubmissionReceipt | None:
        """The server's answer, if it has come."""
        path = self.folder / RECEIPT_FILE
        return SubmissionReceipt.model_validate_json(path.read_bytes()) if path.exists() else None

    def keep_receipt(self, receipt: SubmissionReceipt) -> None:
        """Store the server's answer durably."""
        write_atomically(self.folder / RECEIPT_FILE, receipt.model_dump_json().encode())


class Outbox:
    """The folder of updates."""

    def __init__(self, folder: Path) -> None:
        """Only for the process that holds the lock: it removes what a crash left unfinished."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        durable.sweep(folder)

    def put(
        self,
        assignment: Assignment,
        parts: dict[PartKind, bytes],
        write_state: Callable[[Path], None],
        submission: Callable[[list[Part]], Submission],
    ) -> OutboxEntry:
        """Store an update and the local state that goes with it, in one durable step.

        Args:
            assignment: what it answers.
            parts: the bytes of each file to upload.
            write_state: writes the local state into the folder it is given.
            submission: makes the submission from the list of parts.
        """
        final = self._path(assignment.assignment_id)
        temporary = final.with_name(final.name + durable.UNFINISHED)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        listed = []
        for kind, content in sorted(parts.items()):
            (temporary / _file_name(kind)).write_bytes(content)
            listed.append(Part(kind=kind, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)))
        manifest = OutboxManifest(assignment=assignment, submission=submission(listed))
        (temporary / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        (temporary / STATE_FOLDER).mkdir()
        write_state(temporary / STATE_FOLDER)
        durable.publish(temporary, final)
        return OutboxEntry(final, manifest.assignment, manifest.submission)

    def pending(self) -> list[OutboxEntry]:
        """Return every update that waits, oldest first. A damaged one is dropped: its round is trained again."""
        entries = []
        for folder in sorted(durable.finished(self._folder), key=lambda path: path.stat().st_mtime_ns):
            entry = _read(folder)
            if entry is None:
                log.error("outbox_entry_damaged", folder=str(folder))
                durable.remove(folder)
            else:
                entries.append(entry)
        return entries

    def drop(self, entry: OutboxEntry) -> None:
        """Forget an update."""
        durable.remove(entry.folder)

    def _path(self, assignment_id: str) -> Path:
        return self._folder / durable.folder_name(assignment_id)


def _read(folder: Path) -> OutboxEntry | None:
    try:
        manifest = OutboxManifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
        entry = OutboxEntry(folder, manifest.assignment, manifest.submission)
        for part in manifest.submission.parts:
            with open(entry.file(part), "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != part.sha256:
                    return None
    except (OSError, ValueError):
        return None
    return entry


def _file_name(kind: PartKind) -> str:
    return f"{kind.value}.safetensors"
