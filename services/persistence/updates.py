"""Updates: the parts that a device uploads, its submission, and what the worker reads and refuses.

Everything a device sends may come twice. The same content gets the same receipt, also when the round has long been
closed; other content is a conflict. What comes too late raises `RoundClosed`, which `Database.transaction` commits: the
assignment is `late` from then on, and nothing else has changed.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, bindparam, or_, select
from sqlalchemy.orm import Session

from persistence import artifacts, events, late_updates
from persistence.assignments import owned, start_collecting, with_round
from persistence.errors import RoundClosed
from persistence.round_lifecycle import SUBMITTED, settle
from persistence.run_config import config_of
from persistence.table_base import shorten
from persistence.tables import AssignmentRow, RoundRow, RunRow, UpdatePartRow
from persistence.transitions import TAKES_UPDATES, UNDELIVERED, move
from protocol.adapter_shapes import tensors_at_rank
from protocol.assignments import PartReceipt, Submission, SubmissionReceipt, UpdateOutcome
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.part_sizes import MOST_VOCABULARY_BYTES, most_delta_bytes, most_logits_bytes
from protocol.safetensors_header import TensorInfo
from protocol.statuses import AssignmentStatus, PartKind, RunStatus
from protocol.strategies import STRATEGIES, StrategySpec

_PART = (  # put together once, like the statements of `persistence.assignments`
    select(UpdatePartRow)
    .where(UpdatePartRow.assignment_id == bindparam("assignment_id"), UpdatePartRow.kind == bindparam("kind"))
    .execution_options(populate_existing=True)
)


@dataclass(frozen=True)
class UpdateRecord:
    """A submitted update, as the worker reads it. `parts` maps a kind to the SHA-256 of its file.

    `staleness` is set of a late one that was trained for an earlier round: how many versions its base is old.
    """

    assignment_id: str
    device_id: str
    num_examples: int
    parts: dict[PartKind, str]
    metrics: dict[str, Any]
    adapter_rank: int | None
    """Of its delta; None: the run's."""
    staleness: int | None = None


@dataclass(frozen=True)
class PartAdmission:
    """What a part must agree with; None where there is nothing to agree with."""

    run_id: str
    round_id: str
    base_sha256: str | None
    proxy_manifest_sha256: str | None
    probe_set_sha256: str | None
    expected_tensors: dict[str, TensorInfo] | None
    most_bytes: int | None
    """No honest part is larger."""
    adapter_rank: int | None = None
    """Of the expected tensors, where it is not the run's."""


def admit_part(session: Session, device_id: str, assignment_id: str, kind: PartKind, now: datetime) -> PartAdmission:
    """Say, before a byte of it is read, whether a part may come, and what it must agree with.

    Raises:
        DomainError: as `record_part`, but for UPDATE_CONFLICT.
    """
    run, round_row, row = with_round(session, device_id, assignment_id, lock=True)
    if row.status not in SUBMITTED:
        row = _see_taking(session, run, round_row, row, now)
    return _admission(session, run, round_row, row, kind)


def look_at_part(
    session: Session, device_id: str, assignment_id: str, kind: PartKind, now: datetime
) -> PartAdmission | None:
    """Say what `admit_part` says, where that needs no lock and changes nothing: for a session that only reads.

    Returns:
        None: it needs both; ask `admit_part`.

    Raises:
        DomainError: ASSIGNMENT_NOT_FOUND; INVALID_FIELD, the strategy has no such part.
    """
    run, round_row, row = with_round(session, device_id, assignment_id)
    in_time = now < round_row.deadline_at and row.status in UNDELIVERED
    if row.status in SUBMITTED or (in_time and _takes(run, round_row)):
        return _admission(session, run, round_row, row, kind)
    return None


def _admission(session: Session, run: RunRow, round_row: RoundRow, row: AssignmentRow, kind: PartKind) -> PartAdmission:
    _check_kind(run, kind)
    tensors = _tensors(run, row.adapter_rank) if kind is PartKind.ADAPTER_DELTA else None
    return PartAdmission(
        run_id=run.id,
        round_id=round_row.id,
        base_sha256=round_row.base_adapter_sha256,
        proxy_manifest_sha256=run.proxy_manifest_sha256,
        probe_set_sha256=run.probe_set_sha256,
        expected_tensors=tensors,
        most_bytes=most_delta_bytes(tensors) if tensors is not None else _most_bytes(session, run, kind),
        adapter_rank=row.adapter_rank,
    )


def record_part(  # noqa: PLR0917
    session: Session, device_id: str, assignment_id: str, kind: PartKind, sha256: str, size: int, now: datetime
) -> PartReceipt:
    """Remember that the store holds a part of the device's update.

    Raises:
        DomainError: ASSIGNMENT_NOT_FOUND; INVALID_FIELD, the strategy has no such part; UPDATE_CONFLICT, another file
            came for it before; ILLEGAL_TRANSITION, the assignment was rejected; DEVICE_REVOKED, meanwhile.
        RoundClosed: too late; the assignment is `late`, which the transaction commits.
    """
    run, round_row, row = with_round(session, device_id, assignment_id, lock=True)
    if (known := _part(session, assignment_id, kind)) is not None:
        return _same_part(known, sha256)
    _check_kind(run, kind)
    row = _see_taking(session, run, round_row, row, now)
    artifacts.register(session, sha256, size, kind.value, run.id, now)
    part = UpdatePartRow(assignment_id=row.id, kind=kind, sha256=sha256, size_bytes=size, received_at=now)
    session.add(part)
    start_collecting(session, round_row, now)
    if row.status in UNDELIVERED and row.status is not AssignmentStatus.UPLOADING:
        move(session, row, AssignmentStatus.UPLOADING, now=now)
    return _same_part(part, sha256)


def find_receipt(session: Session, assignment_id: str, kind: PartKind, sha256: str | None = None) -> PartReceipt | None:
    """Return the receipt of a part that is here, None if none is. Raises UPDATE_CONFLICT if it is not `sha256`."""
    known = _part(session, assignment_id, kind)
    return None if known is None else _same_part(known, sha256 or known.sha256)


def submit(
    session: Session, device_id: str, assignment_id: str, submission: Submission, now: datetime
) -> SubmissionReceipt:
    """Accept an update whose parts are all here, and close the round if it was the last one to wait for.

    Raises:
        DomainError: ASSIGNMENT_NOT_FOUND; UPDATE_CONFLICT, another submission came before; UPDATE_INCOMPLETE, parts
            are missing, too many, or not the uploaded ones; WRONG_BASE_VERSION; ILLEGAL_TRANSITION, the assignment was
            rejected; DEVICE_REVOKED, meanwhile.
        RoundClosed: too late; the assignment is `late`, which the transaction commits.
    """
    digest = _identity(submission)
    run, round_row, row = with_round(session, device_id, assignment_id, lock=True)
    if row.update_sha256 is not None:
        return _same_submission(row, digest)
    row = _see_taking(session, run, round_row, row, now)
    _check_base(round_row, submission)
    _check_parts(session, run, row, submission)
    start_collecting(session, round_row, now)
    values = {
        "num_examples": submission.num_examples,
        "metrics": submission.metrics.model_dump(mode="json"),
        "update_sha256": digest,
        "submitted_at": now,
    }
    late = row.status is AssignmentStatus.LATE
    if late:
        late_updates.keep(session, run, row, values, now)
    else:
        move(session, row, AssignmentStatus.SUBMITTED, now=now, values=values)
    data = {"assignment_id": row.id, "update_sha256": digest, "num_examples": submission.num_examples, "late": late}
    events.append(
        session, EventType.UPDATE_SUBMITTED, now, run_id=run.id, round_id=row.round_id, device_id=device_id, data=data
    )
    settle(session, run, round_row, now)
    return _same_submission(row, digest)


def submitted_updates(session: Session, round_id: str) -> list[UpdateRecord]:
    """Return the round's updates, submitted or already counted, and the late ones that it took, which come first.

    Each in the order of the device ids. The order is part of the result: a mean of floats depends on it in its last
    bits, and a stage that is done again must give the same bytes.
    """
    taken = and_(AssignmentRow.used_in_round_id == round_id, AssignmentRow.status == AssignmentStatus.LATE)
    here = and_(late_updates.in_round(round_id), or_(AssignmentRow.status.in_(SUBMITTED), taken))
    rows = session.scalars(
        select(AssignmentRow)
        .where(here)
        .order_by(AssignmentRow.used_in_round_id.is_(None), AssignmentRow.device_id, AssignmentRow.id)
        .execution_options(populate_existing=True)
    ).all()
    parts: dict[str, dict[PartKind, str]] = {row.id: {} for row in rows}
    stored = session.execute(
        select(UpdatePartRow.assignment_id, UpdatePartRow.kind, UpdatePartRow.sha256)
        .join(AssignmentRow, AssignmentRow.id == UpdatePartRow.assignment_id)
        .where(here)
        .order_by(UpdatePartRow.kind)
    )
    for assignment_id, kind, sha256 in stored:
        parts[assignment_id][kind] = sha256
    return [
        UpdateRecord(
            row.id, row.device_id, row.num_examples or 0, parts[row.id], row.metrics, row.adapter_rank, row.staleness
        )
        for row in rows
    ]


def reject_update(session: Session, assignment_id: str, code: ErrorCode, reason: str, now: datetime) -> None:
    """Refuse a submitted update whose values are wrong; the device and the operator can read why. Again: no change.

    Raises:
        DomainError: ASSIGNMENT_NOT_FOUND; ILLEGAL_TRANSITION, it was counted or never submitted.
    """
    _hold_back(session, assignment_id, AssignmentStatus.REJECTED, EventType.UPDATE_REJECTED, code, reason, now)


def quarantine_update(session: Session, assignment_id: str, code: ErrorCode, reason: str, now: datetime) -> None:
    """Keep a submitted update out of its round's result, and say why. Its files stay. Raises as `reject_update`."""
    _hold_back(session, assignment_id, AssignmentStatus.QUARANTINED, EventType.UPDATE_QUARANTINED, code, reason, now)


def outcome(session: Session, device_id: str, assignment_id: str) -> UpdateOutcome:
    """Return what became of a device's update. Raises DomainError ASSIGNMENT_NOT_FOUND."""
    row = owned(session, device_id, assignment_id)
    receipt = None if row.update_sha256 is None else _same_submission(row, row.update_sha256)
    return UpdateOutcome(assignment_id=row.id, status=row.status, reason=row.reason, receipt=receipt)


def _hold_back(  # noqa: PLR0917
    session: Session,
    assignment_id: str,
    to: AssignmentStatus,
    event: EventType,
    code: ErrorCode,
    reason: str,
    now: datetime,
) -> None:
    row = session.scalar(
        select(AssignmentRow)
        .where(AssignmentRow.id == assignment_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    if row is None:
        raise DomainError(ErrorCode.ASSIGNMENT_NOT_FOUND, f"no assignment {assignment_id!r}", received=assignment_id)
    if row.status is to:
        return
    kept = shorten(f"{code.value}: {reason}")
    if row.status is not AssignmentStatus.SUBMITTED and row.used_in_round_id is None:
        detail = f"assignment {row.id} is {row.status.value}; only a submitted update can become {to.value}"
        raise DomainError(ErrorCode.ILLEGAL_TRANSITION, detail, expected="submitted", received=row.status.value)
    move(session, row, to, now=now, reason=kept, values={"reason": kept})
    data = {"assignment_id": row.id, "code": code.value, "reason": kept}
    events.append(session, event, now, run_id=row.run_id, round_id=row.round_id, device_id=row.device_id, data=data)


def expected_tensors(session: Session, round_id: str) -> dict[str, TensorInfo] | None:
    """Return the tensors that a delta at the run's own rank must have, by name; None where there is none."""
    run = session.scalar(select(RunRow).join(RoundRow, RoundRow.run_id == RunRow.id).where(RoundRow.id == round_id))
    return _tensors(run) if run is not None else None


def _tensors(run: RunRow, adapter_rank: int | None = None) -> dict[str, TensorInfo] | None:
    if run.expected_tensors is None:
        return None
    full = {name: TensorInfo(item["dtype"], tuple(item["shape"])) for name, item in run.expected_tensors.items()}
    return full if adapter_rank is None else tensors_at_rank(full, adapter_rank)


def _takes(run: RunRow, round_row: RoundRow) -> bool:
    return round_row.status in TAKES_UPDATES and run.status in (RunStatus.RUNNING, RunStatus.PAUSED)


def _see_taking(session: Session, run: RunRow, round_row: RoundRow, row: AssignmentRow, now: datetime) -> AssignmentRow:
    """See that a locked round still takes a locked assignment; return that as it is then.

    Else it is marked late; and refused, unless the run keeps late updates.
    """
    if row.status in (AssignmentStatus.REJECTED, AssignmentStatus.QUARANTINED):
        detail = f"assignment {row.id} is {row.status.value}: {row.reason}"
        raise DomainError(ErrorCode.ILLEGAL_TRANSITION, detail, received=row.status.value)
    if now >= round_row.deadline_at:
        settle(session, run, round_row, now)
        row = owned(session, row.device_id, row.id)
    taking = _takes(run, round_row)
    if taking and row.status is AssignmentStatus.LOST:
        # Nothing else loses an assignment of such a round; the credential was still good when the bytes began to come.
        raise DomainError(
            ErrorCode.DEVICE_REVOKED, f"assignment {row.id} is lost: {row.reason}", received=row.device_id
        )
    if taking or row.status in SUBMITTED:
        return row
    detail = f"round {round_row.number} is {round_row.status.value} and takes no more updates"
    refused = late_updates.refusal(session, run, round_row)
    detail += "" if refused is None else f": {refused}"
    if row.status is not AssignmentStatus.LATE:
        move(session, row, AssignmentStatus.LATE, now=now, reason=detail, values={"reason": detail})
    if refused is None:
        return row
    raise RoundClosed(detail, received=round_row.status.value)


def _spec(run: RunRow) -> StrategySpec:
    return STRATEGIES[run.config["strategy"]["name"]]


def _check_kind(run: RunRow, kind: PartKind) -> None:
    spec = _spec(run)
    if kind not in spec.parts:
        expected = sorted(spec.parts)
        detail = f"strategy {spec.name} takes {', '.join(expected) or 'no files'}, not {kind.value}"
        raise DomainError(ErrorCode.INVALID_FIELD, detail, expected=expected, received=kind.value)


def _most_bytes(session: Session, run: RunRow, kind: PartKind) -> int | None:
    """Of logits, a message or a tokenizer; None where nothing is known."""
    if kind is PartKind.SLM_VOCABULARY:
        return MOST_VOCABULARY_BYTES
    settings, probe = config_of(run).strategy, run.probe_set_sha256
    probe_set_bytes = artifacts.get(session, probe).size_bytes if probe is not None else 0
    if kind is _spec(run).sent_message:
        return settings.most_message_bytes(probe_set_bytes)
    kept_classes = settings.kept_classes if kind is PartKind.LOGITS and probe is not None else None
    return most_logits_bytes(probe_set_bytes, kept_classes) if kept_classes is not None else None


def _part(session: Session, assignment_id: str, kind: PartKind) -> UpdatePartRow | None:
    return session.scalar(_PART, {"assignment_id": assignment_id, "kind": kind})


def _same_part(part: UpdatePartRow, sha256: str) -> PartReceipt:
    if part.sha256 != sha256:
        detail = f"part {part.kind.value} was received with SHA-256 {part.sha256}; now {sha256} came"
        raise DomainError(ErrorCode.UPDATE_CONFLICT, detail, expected=part.sha256, received=sha256)
    return PartReceipt(
        assignment_id=part.assignment_id,
        kind=part.kind,
        sha256=part.sha256,
        size_bytes=part.size_bytes,
        received_at=part.received_at,
    )


def _same_submission(row: AssignmentRow, digest: str) -> SubmissionReceipt:
    assert row.update_sha256 is not None
    assert row.submitted_at is not None
    if row.update_sha256 != digest:
        detail = f"update {row.update_sha256} was received for this assignment; now {digest} came"
        raise DomainError(ErrorCode.UPDATE_CONFLICT, detail, expected=row.update_sha256, received=digest)
    return SubmissionReceipt(
        assignment_id=row.id,
        round_id=row.round_id,
        update_sha256=digest,
        received_at=row.submitted_at,
        counts_in=row.late_use or "this_round",
    )


def _check_base(round_row: RoundRow, submission: Submission) -> None:
    if submission.base_sha256 != round_row.base_adapter_sha256:
        expected, received = round_row.base_adapter_sha256, submission.base_sha256
        detail = f"round {round_row.number} starts from adapter {expected}, the update from {received}"
        raise DomainError(ErrorCode.WRONG_BASE_VERSION, detail, expected=expected, received=received)


def _check_parts(session: Session, run: RunRow, row: AssignmentRow, submission: Submission) -> None:
    spec = _spec(run)
    stored = session.scalars(select(UpdatePartRow).where(UpdatePartRow.assignment_id == row.id))
    uploaded = sorted(f"{part.kind.value} {part.sha256} {part.size_bytes}" for part in stored)
    named = sorted(f"{part.kind.value} {part.sha256} {part.size_bytes}" for part in submission.parts)
    received = sorted(part.kind for part in submission.parts)
    expected = sorted(spec.uploads | (spec.parts & set(received)))
    if received != expected:
        detail = f"expected the parts {', '.join(expected) or 'none'}, the update names {', '.join(received) or 'none'}"
        raise DomainError(ErrorCode.UPDATE_INCOMPLETE, detail, expected=expected, received=received)
    if uploaded != named:
        detail = f"the uploaded parts are {uploaded or 'none'}; the submission names {named}"
        raise DomainError(ErrorCode.UPDATE_INCOMPLETE, detail, expected=uploaded, received=named)


def _identity(submission: Submission) -> str:
    """Return the SHA-256 of the submission as JSON with sorted keys and no spaces."""
    text = json.dumps(submission.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
