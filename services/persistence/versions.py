"""Model versions: the pair of adapters that each round leaves, promoted or not, and where each comes from."""

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persistence import paging
from persistence.rounds import number_cursor
from persistence.runs import find_run
from persistence.tables import AssignmentRow, RoundRow, VersionRow
from protocol.errors import DomainError, ErrorCode
from protocol.pages import Page
from protocol.runs import ModelVersion, VersionStep
from protocol.statuses import AssignmentStatus


@dataclass(frozen=True)
class Contributions:
    """What devices gave: how many devices and updates, and the private rows that the devices said they have."""

    num_devices: int
    num_updates: int
    num_examples: int


def get_version(session: Session, run_id: str, number: int) -> ModelVersion:
    """Return a version of a run with its lineage. Raises DomainError RUN_NOT_FOUND or VERSION_NOT_FOUND."""
    find_run(session, run_id)
    row = session.get(VersionRow, (run_id, min(number, 2**31 - 1)), populate_existing=True)
    if row is None:
        detail = f"run {run_id} has no version {number}"
        raise DomainError(ErrorCode.VERSION_NOT_FOUND, detail, received=number)
    return _version(row, _lineage(session, run_id, row.number))


def list_versions(session: Session, run_id: str, *, cursor: str | None = None, limit: int = 50) -> Page[ModelVersion]:
    """Return a run's versions, the newest first. Raises DomainError RUN_NOT_FOUND or INVALID_FIELD (the cursor)."""
    find_run(session, run_id)
    query = select(VersionRow).where(VersionRow.run_id == run_id).order_by(VersionRow.number.desc())
    if cursor is not None:
        query = query.where(VersionRow.number < number_cursor(cursor))
    rows, more = paging.take(session, query, limit)
    items = [_version(row, []) for row in rows]
    return Page[ModelVersion](items=items, next_cursor=str(rows[-1].number) if more else None)


def contributions(session: Session, version: ModelVersion) -> Contributions:
    """Return what went into a version with all its ancestors, as counts."""
    rounds = [step.round_id for step in version.lineage if step.round_id is not None]
    made_by = func.coalesce(AssignmentRow.used_in_round_id, AssignmentRow.round_id)
    rows = session.execute(
        select(AssignmentRow.device_id, func.count(), func.max(AssignmentRow.num_examples))
        .where(
            AssignmentRow.run_id == version.run_id,
            AssignmentRow.status == AssignmentStatus.COUNTED,
            made_by.in_(rounds),
        )
        .group_by(AssignmentRow.device_id)
    ).all()
    return Contributions(
        num_devices=len(rows),
        num_updates=sum(updates for _, updates, _ in rows),
        num_examples=sum(examples or 0 for _, _, examples in rows),
    )


def _lineage(session: Session, run_id: str, number: int) -> list[VersionStep]:
    """Follow the parents from a version down to version 0: each step is a round and its updates, as counts."""
    late = (
        select(func.count())
        .select_from(AssignmentRow)
        .where(AssignmentRow.used_in_round_id == RoundRow.id, AssignmentRow.status == AssignmentStatus.COUNTED)
        .correlate(RoundRow)
        .scalar_subquery()
    )
    made = session.execute(
        select(VersionRow.number, VersionRow.parent, VersionRow.num_updates, RoundRow.id, RoundRow.number)
        .add_columns(RoundRow.attempt, late)
        .outerjoin(RoundRow, RoundRow.id == VersionRow.round_id)
        .where(VersionRow.run_id == run_id, VersionRow.number <= number)
    )
    steps = {
        version: VersionStep(
            number=version,
            parent=parent,
            round_id=round_id,
            round_number=round_number,
            attempt=attempt,
            num_updates=num_updates,
            num_late_updates=num_late,
        )
        for version, parent, num_updates, round_id, round_number, attempt, num_late in made
    }
    lineage = [steps[number]]
    while (parent := lineage[-1].parent) is not None:
        lineage.append(steps[parent])
    return lineage


def _version(row: VersionRow, lineage: list[VersionStep]) -> ModelVersion:
    return ModelVersion(
        run_id=row.run_id,
        number=row.number,
        round_id=row.round_id,
        promoted=row.promoted,
        proxy_adapter_sha256=row.proxy_adapter_sha256,
        llm_adapter_sha256=row.llm_adapter_sha256,
        num_updates=row.num_updates,
        parent=row.parent,
        lineage=lineage,
        withdrawn_at=row.withdrawn_at,
        withdrawn_reason=row.withdrawn_reason,
        metrics=row.metrics,
        created_at=row.created_at,
    )
