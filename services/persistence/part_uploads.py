"""Files of an update that come in chunks: what is there, what may come next, and when it is forgotten.

One upload for each part of an assignment, found again by the file's hash: a device that starts anew asks with the same
words and goes on. A chunk's bytes are staged in the blob store before it is recorded here, so what is recorded is
there. Of two senders of the same place one is recorded; the other learns that it is the same, or a conflict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import bindparam, delete, or_, select
from sqlalchemy.orm import Session

from persistence import late_updates, updates
from persistence.blobs import StagedChunk
from persistence.identifiers import new_id
from persistence.tables import AssignmentRow, PartUploadRow, RoundRow, RunRow, UpdatePartRow, UploadChunkRow
from persistence.transitions import UNDELIVERED
from protocol.assignments import PartReceipt, PartUpload
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import PartKind

# Put together once, like the statements of `persistence.assignments`.
_OF_PART = select(PartUploadRow).where(
    PartUploadRow.assignment_id == bindparam("assignment_id"), PartUploadRow.kind == bindparam("kind")
)
_UPLOAD = _OF_PART.where(PartUploadRow.id == bindparam("upload_id")).execution_options(populate_existing=True)
_UPLOAD_LOCKED = _UPLOAD.with_for_update()
_DELETE = (
    delete(UploadChunkRow).where(UploadChunkRow.upload_id.in_(bindparam("upload_ids", expanding=True))),
    delete(PartUploadRow).where(PartUploadRow.id.in_(bindparam("upload_ids", expanding=True))),
)

_SENT_BEFORE = (
    select(UpdatePartRow.size_bytes)
    .join(AssignmentRow, AssignmentRow.id == UpdatePartRow.assignment_id)
    .where(
        AssignmentRow.device_id == bindparam("device_id"),
        AssignmentRow.run_id == bindparam("run_id"),
        UpdatePartRow.kind == bindparam("kind"),
        UpdatePartRow.sha256 == bindparam("sha256"),
    )
    .limit(1)
)

SENT_ONCE = frozenset({PartKind.SLM_VOCABULARY})
"""What is the same in every round of a device. In its header is nothing of a round, so it was admitted once for all."""

EXPIRES_AFTER = timedelta(days=1)
"""An upload of which nothing comes for so long is forgotten."""


@dataclass(frozen=True)
class UploadPlace:
    """A place in an upload: where a chunk belongs, and how long it must be."""

    sha256: str
    """Of the whole file, as it was announced."""
    size_bytes: int
    """Of the whole file."""
    offset: int
    chunk_size: int
    """Of the chunk at this place."""
    known_sha256: str | None
    """Of the chunk that came before; None if none did."""

    def refuse_other(self, sha256: str) -> None:
        """See, before a byte is read, that no other chunk came: what is staged in vain fills the disk.

        Raises:
            DomainError: UPDATE_CONFLICT.
        """
        _refuse_other(self.offset, self.known_sha256, sha256)


@dataclass(frozen=True)
class FirstChunk:
    """A file's first chunk, staged under the id of an upload that may have to begin with it."""

    upload_id: str
    """From `new_upload_id`, or of the upload that was begun before."""
    sha256: str


@dataclass(frozen=True)
class ReceivedFile:
    """All of a file's chunks, in order, as they are staged."""

    sha256: str
    size_bytes: int
    chunks: Sequence[StagedChunk]


def take_again(  # noqa: PLR0917
    session: Session, device_id: str, run_id: str, assignment_id: str, kind: PartKind, sha256: str, now: datetime
) -> PartReceipt | None:
    """Record as a part a file that this device has sent for this part in this run; None: it has not.

    Raises:
        DomainError, RoundClosed: as `updates.record_part`.
    """
    if kind not in SENT_ONCE:
        return None
    asked = {"device_id": device_id, "run_id": run_id, "kind": kind, "sha256": sha256}
    size = session.scalar(_SENT_BEFORE, asked)
    if size is None:
        return None
    return updates.record_part(session, device_id, assignment_id, kind, sha256, size, now)


def begin(  # noqa: PLR0917
    session: Session,
    assignment_id: str,
    kind: PartKind,
    sha256: str,
    size_bytes: int,
    chunk_bytes: int,
    now: datetime,
    *,
    first: FirstChunk | None = None,
) -> tuple[PartUpload, str | None]:
    """Begin to receive a file, or say how far it has come. For a part that `updates.admit_part` admitted here and now.

    An unfinished upload of another file for the same part is forgotten.

    Args:
        chunk_bytes: of each chunk but the last, unless it was begun with others.
        first: the chunk that is staged already. It is recorded with an upload that begins here, or was begun under the
            same id and has nothing yet; in any other it does not count.

    Returns:
        The upload, and the id of one that was forgotten: its stage can be dropped after the commit.

    Raises:
        DomainError: UPDATE_CONFLICT, another file was received for the part.
    """
    receipt = updates.find_receipt(session, assignment_id, kind, sha256)
    if receipt is not None:
        return complete(receipt, chunk_bytes), None
    row = _of_part(session, assignment_id, kind)
    forgotten = None
    if row is not None and (row.sha256, row.size_bytes) != (sha256, size_bytes):
        forgotten = row.id
        _delete(session, [row.id])
        row = None
    if row is None:
        row = PartUploadRow(
            id=first.upload_id if first is not None else new_upload_id(now),
            assignment_id=assignment_id,
            kind=kind,
            sha256=sha256,
            size_bytes=size_bytes,
            chunk_bytes=chunk_bytes,
            received_bytes=0,
            begun_at=now,
            touched_at=now,
        )
        session.add(row)
    if first is not None and row.id == first.upload_id and row.received_bytes == 0:
        _receive(session, row, first.sha256)
    row.touched_at = now
    session.flush()
    return _shown(row), forgotten


def _receive(session: Session, row: PartUploadRow, sha256: str) -> None:
    """Record the chunk that an upload lacks next."""
    size = min(row.chunk_bytes, row.size_bytes - row.received_bytes)
    number = row.received_bytes // row.chunk_bytes
    session.add(UploadChunkRow(upload_id=row.id, number=number, sha256=sha256, size_bytes=size))
    row.received_bytes += size


def new_upload_id(now: datetime) -> str:
    """Return an id for an upload that will begin."""
    return new_id("upl", now)


def look(  # noqa: PLR0917
    session: Session, assignment_id: str, kind: PartKind, sha256: str, size_bytes: int, chunk_bytes: int
) -> PartUpload | None:
    """Return how far a file has come, None if it was not begun. Raises DomainError UPDATE_CONFLICT as `begin`."""
    receipt = updates.find_receipt(session, assignment_id, kind, sha256)
    if receipt is not None:
        return complete(receipt, chunk_bytes)
    row = _of_part(session, assignment_id, kind)
    return _shown(row) if row is not None and (row.sha256, row.size_bytes) == (sha256, size_bytes) else None


def get(session: Session, assignment_id: str, kind: PartKind, upload_id: str) -> PartUpload:
    """Return an upload of an assignment that the caller owns. Raises DomainError UPLOAD_NOT_FOUND."""
    return _shown(_row(session, assignment_id, kind, upload_id))


def place(session: Session, assignment_id: str, kind: PartKind, upload_id: str, offset: int) -> UploadPlace:
    """Say what must come at `offset`: the next chunk, or one that has come before.

    Raises:
        DomainError: UPLOAD_NOT_FOUND; UPLOAD_OFFSET_MISMATCH, no chunk starts there, or those before it have not come.
    """
    row = _row(session, assignment_id, kind, upload_id)
    if offset > row.received_bytes or offset % row.chunk_bytes or offset >= row.size_bytes:
        raise _wrong_offset(row, offset)
    known = None if offset == row.received_bytes else _chunk(session, row, offset)
    size = min(row.chunk_bytes, row.size_bytes - offset)
    return UploadPlace(row.sha256, row.size_bytes, offset, size, None if known is None else known.sha256)


def record_chunk(  # noqa: PLR0917
    session: Session, assignment_id: str, kind: PartKind, upload_id: str, offset: int, sha256: str, now: datetime
) -> PartUpload:
    """Remember that the chunk at `offset` is staged. Again: no change.

    Raises:
        DomainError: UPLOAD_NOT_FOUND; UPLOAD_OFFSET_MISMATCH; UPDATE_CONFLICT, another chunk came for this place.
    """
    row = _row(session, assignment_id, kind, upload_id, lock=True)
    if offset == row.received_bytes:
        _receive(session, row, sha256)
        row.touched_at = now
        session.flush()
        return _shown(row)
    known = _chunk(session, row, offset)
    if known is None:
        raise _wrong_offset(row, offset)
    _refuse_other(offset, known.sha256, sha256)
    return _shown(row)


def received_file(session: Session, assignment_id: str, kind: PartKind, upload_id: str) -> ReceivedFile:
    """Return the chunks of a file that has come whole.

    Raises:
        DomainError: UPLOAD_NOT_FOUND; UPLOAD_OFFSET_MISMATCH, some are missing.
    """
    row = _row(session, assignment_id, kind, upload_id)
    if row.received_bytes != row.size_bytes:
        raise _wrong_offset(row, row.size_bytes)
    chunks = session.scalars(
        select(UploadChunkRow).where(UploadChunkRow.upload_id == row.id).order_by(UploadChunkRow.number)
    )
    staged = [StagedChunk(each.number * row.chunk_bytes, each.size_bytes, each.sha256) for each in chunks]
    return ReceivedFile(row.sha256, row.size_bytes, staged)


def announced_file(session: Session, assignment_id: str, kind: PartKind, upload_id: str) -> str | None:
    """Return the SHA-256 of an upload's file; None: there is no such upload, or not any more."""
    return session.scalar(
        select(PartUploadRow.sha256).where(
            PartUploadRow.id == upload_id, PartUploadRow.assignment_id == assignment_id, PartUploadRow.kind == kind
        )
    )


def forget(session: Session, upload_id: str) -> None:
    """Forget an upload: its file is complete, or wrong. Drop its stage after the commit. Again: no change."""
    _delete(session, [upload_id])


def forget_idle(session: Session, now: datetime) -> list[str]:
    """Forget the uploads that nobody goes on with, or whose assignment waits for nothing. For the sweep.

    Returns:
        Their ids: drop their stages after the commit.
    """
    expired = now - EXPIRES_AFTER
    found = session.execute(
        select(PartUploadRow, AssignmentRow, RoundRow, RunRow)
        .join(AssignmentRow, AssignmentRow.id == PartUploadRow.assignment_id)
        .join(RoundRow, RoundRow.id == AssignmentRow.round_id)
        .join(RunRow, RunRow.id == AssignmentRow.run_id)
        .where(or_(PartUploadRow.touched_at <= expired, AssignmentRow.status.not_in(UNDELIVERED)))
        .order_by(PartUploadRow.id)
        .with_for_update(of=PartUploadRow, skip_locked=True)
    ).all()
    idle = [
        upload.id
        for upload, assignment, round_row, run in found
        if upload.touched_at <= expired
        or assignment.update_sha256 is not None
        or not late_updates.may_still_come(session, run, round_row, assignment)
    ]
    _delete(session, idle)
    return idle


def known_stages(session: Session, upload_ids: Sequence[str]) -> set[str]:
    """Return which of the uploads are under way."""
    return set(session.scalars(select(PartUploadRow.id).where(PartUploadRow.id.in_(upload_ids))))


def complete(receipt: PartReceipt, chunk_bytes: int) -> PartUpload:
    """Return what an upload looks like whose file is complete."""
    return PartUpload(
        assignment_id=receipt.assignment_id,
        kind=receipt.kind,
        upload_id=None,
        sha256=receipt.sha256,
        size_bytes=receipt.size_bytes,
        chunk_bytes=chunk_bytes,
        received_bytes=receipt.size_bytes,
        expires_at=None,
        receipt=receipt,
    )


def _of_part(session: Session, assignment_id: str, kind: PartKind) -> PartUploadRow | None:
    return session.scalar(_OF_PART, {"assignment_id": assignment_id, "kind": kind})


def _row(session: Session, assignment_id: str, kind: PartKind, upload_id: str, *, lock: bool = False) -> PartUploadRow:
    asked = {"upload_id": upload_id, "assignment_id": assignment_id, "kind": kind}
    row = session.scalar(_UPLOAD_LOCKED if lock else _UPLOAD, asked)
    if row is None:
        detail = f"assignment {assignment_id} has no upload {upload_id!r}; begin again: what is there will be found"
        raise DomainError(ErrorCode.UPLOAD_NOT_FOUND, detail, received=upload_id)
    return row


def _chunk(session: Session, row: PartUploadRow, offset: int) -> UploadChunkRow | None:
    return session.get(UploadChunkRow, (row.id, offset // row.chunk_bytes))


def _refuse_other(offset: int, known_sha256: str | None, sha256: str) -> None:
    if known_sha256 is not None and known_sha256 != sha256:
        detail = f"the chunk at {offset} was received with SHA-256 {known_sha256}; now {sha256} came"
        raise DomainError(ErrorCode.UPDATE_CONFLICT, detail, expected=known_sha256, received=sha256)


def _delete(session: Session, upload_ids: Sequence[str]) -> None:
    for statement in _DELETE:
        session.execute(statement, {"upload_ids": upload_ids}, execution_options={"synchronize_session": False})


def _wrong_offset(row: PartUploadRow, offset: int) -> DomainError:
    detail = f"{row.received_bytes} of {row.size_bytes} bytes are there, in chunks of {row.chunk_bytes}; got {offset}"
    return DomainError(ErrorCode.UPLOAD_OFFSET_MISMATCH, detail, expected=row.received_bytes, received=offset)


def _shown(row: PartUploadRow) -> PartUpload:
    return PartUpload(
        assignment_id=row.assignment_id,
        kind=row.kind,
        upload_id=row.id,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        chunk_bytes=row.chunk_bytes,
        received_bytes=row.received_bytes,
        expires_at=row.touched_at + EXPIRES_AFTER,
    )
