"""Model versions: the pair of adapters that each round leaves, promoted or not."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from persistence.rounds import number_cursor
from persistence.runs import find_run
from persistence.tables import VersionRow
from protocol.errors import DomainError, ErrorCode
from protocol.pages import Page
from protocol.runs import ModelVersion


def get_version(session: Session, run_id: str, number: int) -> ModelVersion:
    """Return a version of a run. Raises DomainError RUN_NOT_FOUND or VERSION_NOT_FOUND."""
    find_run(session, run_id)
    row = session.get(VersionRow, (run_id, min(number, 2**31 - 1)))
    if row is None:
        detail = f"run {run_id} has no version {number}"
        raise DomainError(ErrorCode.VERSION_NOT_FOUND, detail, received=number)
    return _version(row)


def list_versions(session: Session, run_id: str, *, cursor: str | None = None, limit: int = 50) -> Page[ModelVersion]:
    """Return a run's versions, the newest first. Raises DomainError RUN_NOT_FOUND or INVALID_FIELD (the cursor)."""
    find_run(session, run_id)
    query = select(VersionRow).where(VersionRow.run_id == run_id).order_by(VersionRow.number.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(VersionRow.number < number_cursor(cursor))
    rows = list(session.scalars(query))
    more = len(rows) > limit
    rows = rows[:limit]
    items = [_version(row) for row in rows]
    return Page[ModelVersion](items=items, next_cursor=str(rows[-1].number) if more else None)


def _version(row: VersionRow) -> ModelVersion:
    return ModelVersion(
        run_id=row.run_id,
        number=row.number,
        round_id=row.round_id,
        promoted=row.promoted,
        proxy_adapter_sha256=row.proxy_adapter_sha256,
        llm_adapter_sha256=row.llm_adapter_sha256,
        num_updates=row.num_updates,
        metrics=row.metrics,
        created_at=row.created_at,
    )
