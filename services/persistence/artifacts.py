"""Which files exist, how large they are, and which run uses them as what. The bytes are in `persistence.blobs`."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from sqlalchemy import ColumnElement, CursorResult, exists, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from persistence.tables import ArtifactRow, AssignmentRow, RunArtifactRow, Table
from protocol.assignments import ArtifactRef
from protocol.errors import DomainError, ErrorCode

ArtifactKind = Literal[
    "proxy_base", "adapter", "probe_set", "llm_adapter", "server_optimizer", "adapter_delta", "logits"
]
KINDS: tuple[str, ...] = get_args(ArtifactKind)
"""`proxy_base` is the manifest and each file of the proxy's folder; the last two are what devices sent."""

FOR_DEVICES = frozenset({"proxy_base", "adapter", "probe_set"})
"""What a device may fetch: never another device's update, and never the LLM's adapter."""


@dataclass(frozen=True)
class Artifact:
    """A file, with the run and the role in which it was asked for."""

    sha256: str
    size_bytes: int
    kind: str
    run_id: str


def insert_or_keep(session: Session, table: type[Table], values: dict[str, object]) -> bool:
    """Insert a row, or keep the one that is there; two transactions may do it at once. Return whether it is new."""
    insert = postgresql_insert if session.get_bind().dialect.name == "postgresql" else sqlite_insert
    statement = insert(table).values(values).on_conflict_do_nothing()
    result = session.execute(statement, execution_options={"preserve_rowcount": True})
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def register(  # noqa: PLR0917
    session: Session, sha256: str, size: int, kind: str, run_id: str, now: datetime
) -> None:
    """Say that `run_id` uses the stored file as `kind`. Saying it again changes nothing.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)}, got {kind!r}")
    insert_or_keep(session, ArtifactRow, {"sha256": sha256, "size_bytes": size, "created_at": now})
    insert_or_keep(session, RunArtifactRow, {"sha256": sha256, "run_id": run_id, "kind": kind})


def get(session: Session, sha256: str) -> Artifact:
    """Return a file; of several runs that use it, the newest.

    Raises:
        DomainError: ARTIFACT_NOT_FOUND.
    """
    return _first(session, sha256)


def get_for_device(session: Session, sha256: str, device_id: str) -> Artifact:
    """Return a file that the device may fetch, in the newest run that gave the device work.

    Raises:
        DomainError: ARTIFACT_NOT_FOUND, also where the file exists and is not this device's business.
    """
    takes_part = exists().where(AssignmentRow.run_id == RunArtifactRow.run_id, AssignmentRow.device_id == device_id)
    return _first(session, sha256, takes_part, RunArtifactRow.kind.in_(FOR_DEVICES))


def _first(session: Session, sha256: str, *conditions: ColumnElement[bool]) -> Artifact:
    row = session.execute(
        select(ArtifactRow.sha256, ArtifactRow.size_bytes, RunArtifactRow.kind, RunArtifactRow.run_id)
        .join(RunArtifactRow, RunArtifactRow.sha256 == ArtifactRow.sha256)
        .where(ArtifactRow.sha256 == sha256, *conditions)
        .order_by(RunArtifactRow.run_id.desc(), RunArtifactRow.kind)
        .limit(1)
    ).first()
    if row is None:
        raise DomainError(ErrorCode.ARTIFACT_NOT_FOUND, f"no artifact {sha256} here for you", received=sha256)
    return Artifact(row.sha256, row.size_bytes, row.kind, row.run_id)


def references(session: Session, hashes: Iterable[str | None]) -> dict[str, ArtifactRef]:
    """Return what a client needs in order to fetch each of the files, by hash; nulls are skipped."""
    wanted = {sha256 for sha256 in hashes if sha256 is not None}
    if not wanted:
        return {}
    rows = session.execute(select(ArtifactRow.sha256, ArtifactRow.size_bytes).where(ArtifactRow.sha256.in_(wanted)))
    return {row.sha256: ArtifactRef(sha256=row.sha256, size_bytes=row.size_bytes) for row in rows}
