"""Assignments: a device asks for work, says where it is, or refuses.

New work comes from the runs of the device's federations. Of several, the round that has been open for longest comes
first, so that no run keeps a device from the others.
"""

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Table, and_, bindparam, exists, func, or_, select, update
from sqlalchemy.orm import Session

from persistence import artifacts, devices, late_updates
from persistence.identifiers import new_id
from persistence.round_lifecycle import SUBMITTED, lock_round, settle
from persistence.run_config import config_of
from persistence.table_base import shorten
from persistence.tables import AssignmentRow, FederationDeviceRow, RoundRow, RunRow
from persistence.transitions import TAKES_UPDATES, UNDELIVERED, move
from protocol.assignments import ArtifactRef, Assignment, AssignmentProgress, AssignmentRefusal
from protocol.devices import DeviceProfile
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import AssignmentStatus, PartKind, RoundStatus, RunStatus
from protocol.strategies import spec_of

_ORDER = list(AssignmentStatus)

# Statements of what devices ask most, put together once: to build one takes longer than to execute it.
_OWNED = (
    select(AssignmentRow)
    .where(AssignmentRow.id == bindparam("assignment_id"), AssignmentRow.device_id == bindparam("device_id"))
    .execution_options(populate_existing=True)
)
_OWNED_LOCKED = _OWNED.with_for_update(key_share=True)
_WITH_ROUND = (
    select(RunRow, RoundRow, AssignmentRow)  # In the order in which everybody locks.
    .join(RoundRow, RoundRow.run_id == RunRow.id)
    .join(AssignmentRow, AssignmentRow.round_id == RoundRow.id)
    .where(AssignmentRow.id == bindparam("assignment_id"), AssignmentRow.device_id == bindparam("device_id"))
    .execution_options(populate_existing=True)
)
_WITH_ROUND_LOCKED = _WITH_ROUND.with_for_update(key_share=True)
_ROUND_STATUS = (
    select(RoundRow.status)
    .join(AssignmentRow, AssignmentRow.round_id == RoundRow.id)
    .where(AssignmentRow.id == bindparam("assignment_id"))
)
_TABLE = AssignmentRow.__table__
assert isinstance(_TABLE, Table)
_NOTE_PROGRESS = (
    update(_TABLE)
    .where(_TABLE.c.id == bindparam("assignment_id"))
    .values({name: bindparam(f"new_{name}") for name in ("stage", "step", "steps", "losses")})
)
_UNFINISHED = (
    select(AssignmentRow, RoundRow, RunRow)
    .join(RoundRow, RoundRow.id == AssignmentRow.round_id)
    .join(RunRow, RunRow.id == RoundRow.run_id)
    .where(
        AssignmentRow.device_id == bindparam("device_id"),
        AssignmentRow.status.in_(UNDELIVERED),
        RoundRow.status.in_(TAKES_UPDATES),
        # A paused run's clock stands still, and what a device has begun it may finish.
        or_(
            and_(RoundRow.deadline_at > bindparam("now"), RunRow.status == RunStatus.RUNNING),
            RunRow.status == RunStatus.PAUSED,
        ),
    )
    .order_by(AssignmentRow.id)
    .limit(1)
)
_UNFINISHED_ID = _UNFINISHED.with_only_columns(AssignmentRow.id)
_PLACES_TAKEN = (
    select(func.count())
    .select_from(AssignmentRow)
    .where(AssignmentRow.round_id == RoundRow.id, AssignmentRow.status.in_(UNDELIVERED | SUBMITTED))
    .correlate(RoundRow)
    .scalar_subquery()
)
_FILES = (
    RunRow.proxy_manifest_sha256,
    RoundRow.base_adapter_sha256,
    RunRow.probe_set_sha256,
    RunRow.llm_vocabulary_sha256,
    RoundRow.base_message_sha256,
)
_CANDIDATES = (
    select(RoundRow.id, RunRow.device_ids, RunRow.id, *_FILES)
    .join(RunRow, RunRow.id == RoundRow.run_id)
    .where(
        RoundRow.status.in_(TAKES_UPDATES),
        RoundRow.deadline_at > bindparam("now"),
        RunRow.status == RunStatus.RUNNING,
        ~exists().where(AssignmentRow.round_id == RoundRow.id, AssignmentRow.device_id == bindparam("device_id")),
        exists().where(
            FederationDeviceRow.federation == RunRow.federation,
            FederationDeviceRow.device_id == bindparam("device_id"),
        ),
        (RunRow.max_updates.is_(None)) | (RunRow.max_updates > _PLACES_TAKEN),
    )
    .order_by(RoundRow.opened_at, RoundRow.id)
)
_ANOTHER_SUBMITTED = (
    select(AssignmentRow.id)
    .where(
        AssignmentRow.device_id == bindparam("device_id"),
        AssignmentRow.run_id == bindparam("run_id"),
        AssignmentRow.id != bindparam("assignment_id"),
        AssignmentRow.status.in_(SUBMITTED),
    )
    .limit(1)
)


def work_waits(session: Session, device_id: str, now: datetime) -> bool:
    """Return whether `next_assignment` would find something. Two statements, which only read: for a long poll.

    It may be wrong for a moment, when another device takes the last place; `next_assignment` decides.
    """
    if _candidates(session, device_id, now):
        return True
    return session.scalar(_UNFINISHED_ID, {"device_id": device_id, "now": now}) is not None


def next_assignment(
    session: Session, device_id: str, now: datetime, upload_limits: Mapping[PartKind, int]
) -> Assignment | None:
    """Return the device's unfinished assignment, else a new one in the oldest round that has a place, else None.

    The device counts as seen. Asking twice returns the same assignment: there is one a round and device.

    Args:
        upload_limits: largest size of each kind of part, bytes; passed on.

    Raises:
        DomainError: DEVICE_NOT_APPROVED, DEVICE_REVOKED or DEVICE_NOT_FOUND.
    """
    device = devices.may_work(session, device_id)
    profile = DeviceProfile.model_validate(device.profile)
    assignment = _unfinished_or_new(session, device_id, profile, now, upload_limits)
    devices.touch(session, device, now)  # Last, so that the device is not locked while the round's lock is waited for.
    return assignment


def _unfinished_or_new(
    session: Session, device_id: str, profile: DeviceProfile, now: datetime, upload_limits: Mapping[PartKind, int]
) -> Assignment | None:
    asked = {"device_id": device_id, "now": now}
    # In this order: what another request of the device is given meanwhile is no candidate any more, but unfinished.
    candidates = _candidates(session, device_id, now)
    found = session.execute(_UNFINISHED, asked).first()
    if found is not None:
        return _assignment(session, *found, upload_limits)
    for candidate in candidates:
        # Before the lock, which all devices that are given work at once wait for in turn; a round's files never change.
        given = _given(session, device_id, candidate.run_id, candidate.files)
        run, round_row = lock_round(session, candidate.round_id)
        # Decided again under the lock: the same device may have asked twice at once, or another took the last place.
        found = session.execute(_UNFINISHED, asked).first()
        if found is not None:
            return _assignment(session, *found, upload_limits)
        if candidate in _candidates(session, device_id, now):
            row = AssignmentRow(
                id=new_id("asg", now),
                run_id=run.id,
                round_id=round_row.id,
                device_id=device_id,
                status=AssignmentStatus.OFFERED,
                adapter_rank=_adapter_rank(run, profile),
                losses={},
                metrics={},
                offered_at=now,
            )
            session.add(row)
            session.flush()
            return _assignment(session, row, round_row, run, upload_limits, given=given)
    return None


def get_assignment(
    session: Session, device_id: str, assignment_id: str, upload_limits: Mapping[PartKind, int]
) -> Assignment:
    """Return one of the device's assignments. Raises DomainError ASSIGNMENT_NOT_FOUND."""
    run, round_row, row = with_round(session, device_id, assignment_id)
    return _assignment(session, row, round_row, run, upload_limits)


def report_progress(
    session: Session, device_id: str, assignment_id: str, progress: AssignmentProgress, now: datetime
) -> AssignmentRow:
    """Remember where the device is; return the assignment, whose status may be ahead of the report.

    The status only moves forward: a device that starts again after a crash reports an earlier one, and then only its
    stage, step and losses are noted. Losses that are not finite are left out. The round starts to collect with the
    first report.

    Raises:
        DomainError: ASSIGNMENT_NOT_FOUND; ROUND_CLOSED, it is too late, a late update will not be taken, and training
            on is a waste; ILLEGAL_TRANSITION, the assignment was rejected.
    """
    status = session.scalar(_ROUND_STATUS, {"assignment_id": assignment_id})
    if status is RoundStatus.OPEN:  # Only the first report of a round has to lock it, before the assignment.
        _, round_row, row = with_round(session, device_id, assignment_id, lock=True)
        status = start_collecting(session, round_row, now)
    else:
        row = owned(session, device_id, assignment_id, lock=True)
    if row.status in SUBMITTED:
        return row
    if row.status not in UNDELIVERED or status not in TAKES_UPDATES:
        if not late_updates.may_still_come(
            session, session.get_one(RunRow, row.run_id), session.get_one(RoundRow, row.round_id), row
        ):
            raise _not_workable(row, status)
        return row
    values = {
        "stage": progress.stage,
        "step": progress.step,
        "steps": progress.steps,
        "losses": {name: loss for name, loss in progress.losses.items() if math.isfinite(loss)},
    }
    to = AssignmentStatus(progress.status)
    if _ORDER.index(to) > _ORDER.index(row.status):
        move(session, row, to, now=now, values=values)
    else:
        session.execute(_NOTE_PROGRESS, {"assignment_id": row.id} | {f"new_{name}": values[name] for name in values})
    return row


def refuse_assignment(
    session: Session, device_id: str, assignment_id: str, refusal: AssignmentRefusal, now: datetime
) -> AssignmentRow:
    """Take the device's no; return the assignment. Repeated, or said when the round is over anyway, it changes nothing.

    The device's own words are kept in the assignment, for the operator; the event feed gets its code only.

    Raises:
        DomainError: ASSIGNMENT_NOT_FOUND; ILLEGAL_TRANSITION, the update is submitted.
    """
    round_id = owned(session, device_id, assignment_id).round_id
    run, round_row = lock_round(session, round_id)
    row = owned(session, device_id, assignment_id, lock=True)
    if row.status in (AssignmentStatus.REJECTED, AssignmentStatus.LOST, AssignmentStatus.LATE):
        return row
    if row.status in SUBMITTED or row.status is AssignmentStatus.QUARANTINED:
        detail = f"assignment {row.id} is {row.status.value}; it is too late to refuse it"
        raise DomainError(ErrorCode.ILLEGAL_TRANSITION, detail, received=row.status.value)
    known = refusal.code in set(ErrorCode) or refusal.code.replace("_", "").isalpha()
    reason = f"refused by the device: {refusal.code if known else 'other'}"
    kept = shorten(f"refused by the device: {refusal.code}: {refusal.reason}")
    start_collecting(session, round_row, now)
    move(session, row, AssignmentStatus.REJECTED, now=now, reason=reason, values={"reason": kept})
    settle(session, run, round_row, now)
    return row


def owned(session: Session, device_id: str, assignment_id: str, *, lock: bool = False) -> AssignmentRow:
    """Return a device's assignment as it is now. Raises DomainError ASSIGNMENT_NOT_FOUND, also if it is another's."""
    asked = {"assignment_id": assignment_id, "device_id": device_id}
    row = session.scalar(_OWNED_LOCKED if lock else _OWNED, asked)
    if row is None:
        raise _not_found(assignment_id)
    return row


def with_round(
    session: Session, device_id: str, assignment_id: str, *, lock: bool = False
) -> tuple[RunRow, RoundRow, AssignmentRow]:
    """Return a device's assignment as it is now, with its run and round; all locked if asked. Raises as `owned`."""
    asked = {"assignment_id": assignment_id, "device_id": device_id}
    found = session.execute(_WITH_ROUND_LOCKED if lock else _WITH_ROUND, asked).first()
    if found is None:
        raise _not_found(assignment_id)
    run, round_row, row = found
    return run, round_row, row


def run_of(session: Session, assignment_id: str) -> str:
    """Return the run of an assignment that this session has read."""
    return session.get_one(AssignmentRow, assignment_id).run_id


def _not_found(assignment_id: str) -> DomainError:
    detail = f"this device has no assignment {assignment_id!r}"
    return DomainError(ErrorCode.ASSIGNMENT_NOT_FOUND, detail, received=assignment_id)


def start_collecting(session: Session, round_row: RoundRow, now: datetime) -> RoundStatus:
    """Move a locked round from open to collecting, if it is open; return its status."""
    if round_row.status is RoundStatus.OPEN:
        move(session, round_row, RoundStatus.COLLECTING, now=now, reason="the first device works on it")
    return round_row.status


def _not_workable(row: AssignmentRow, round_status: RoundStatus | None) -> DomainError:
    if row.status in (AssignmentStatus.REJECTED, AssignmentStatus.QUARANTINED):
        detail = f"assignment {row.id} is {row.status.value}: {row.reason}"
        return DomainError(ErrorCode.ILLEGAL_TRANSITION, detail, received=row.status)
    detail = f"the round of assignment {row.id} is {round_status}; an update would come too late"
    return DomainError(ErrorCode.ROUND_CLOSED, detail, expected=["open", "collecting"], received=round_status)


class _Candidate(NamedTuple):
    """A round that a device may be given."""

    round_id: str
    run_id: str
    files: tuple[str | None, ...]
    """Hashes of what it would be given, as in `_FILES`."""


def _candidates(session: Session, device_id: str, now: datetime) -> list[_Candidate]:
    """Return the open rounds that the device has no assignment of and is meant for, the one opened first at first."""
    rows = session.execute(_CANDIDATES, {"device_id": device_id, "now": now})
    return [
        _Candidate(round_id, run_id, tuple(files))
        for round_id, device_ids, run_id, *files in rows
        if device_ids is None or device_id in device_ids
    ]


class _Given(NamedTuple):
    """What an assignment says beside its own row, its round and its run."""

    files: Mapping[str, ArtifactRef]
    """By hash."""
    tuned_before: bool
    """Whether the device has submitted another update of the run."""


def _given(
    session: Session, device_id: str, run_id: str, files: Iterable[str | None], assignment_id: str | None = None
) -> _Given:
    """Look up what an assignment is given; None: one that there is not yet."""
    asked = {"device_id": device_id, "run_id": run_id, "assignment_id": assignment_id or ""}
    return _Given(artifacts.references(session, files), session.scalar(_ANOTHER_SUBMITTED, asked) is not None)


def _adapter_rank(run: RunRow, profile: DeviceProfile) -> int | None:
    """Return the rank that this device is given for the round, whatever its profile says later; None: the run's."""
    return config_of(run).strategy.assigned_rank(profile.max_adapter_rank)


def _assignment(
    session: Session,
    row: AssignmentRow,
    round_row: RoundRow,
    run: RunRow,
    upload_limits: Mapping[PartKind, int],
    *,
    given: _Given | None = None,
) -> Assignment:
    config = config_of(run)
    spec = spec_of(config.strategy)
    uploads = sorted(spec.parts)
    hashes = (
        run.proxy_manifest_sha256,
        round_row.base_adapter_sha256,
        run.probe_set_sha256,
        run.llm_vocabulary_sha256,
        round_row.base_message_sha256,
    )
    files, tuned_before = given or _given(session, row.device_id, run.id, hashes, row.id)
    return Assignment(
        assignment_id=row.id,
        run_id=run.id,
        run_name=run.name,
        round_id=round_row.id,
        round_number=round_row.number,
        rounds=config.rounds,
        status=row.status,
        strategy=config.strategy,
        seed=config.seed,
        base_version=round_row.base_version,
        proxy_manifest=files.get(run.proxy_manifest_sha256 or ""),
        adapter=files.get(round_row.base_adapter_sha256 or ""),
        adapter_rank=row.adapter_rank,
        probe_set=files.get(run.probe_set_sha256 or ""),
        llm_vocabulary=files.get(run.llm_vocabulary_sha256 or ""),
        message=files.get(round_row.base_message_sha256 or ""),
        uploads=uploads,
        optional_uploads=sorted(spec.parts - spec.uploads),
        upload_limits={kind: upload_limits[kind] for kind in uploads if kind in upload_limits},
        evaluation=config.evaluation,
        evaluate_before=not tuned_before,
        evaluate_after=round_row.number == config.rounds,
        deadline_at=round_row.deadline_at,
    )
