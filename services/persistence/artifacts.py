"""Which files exist, how large they are, and which run uses them as what. The bytes are in `persistence.blobs`."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from sqlalchemy import Row, bindparam, exists, select
from sqlalchemy.orm import Session

from persistence.database import require_blob
from persistence.inserting import insert_or_keep
from persistence.tables import ArtifactRow, AssignmentRow, RunArtifactRow
from protocol.assignments import ArtifactRef
from protocol.errors import DomainError, ErrorCode

ArtifactKind = Literal[
    "proxy_base",
    "model_manifest",
    "small_model",
    "adapter",
    "probe_set",
    "llm_vocabulary",
    "llm_logits",
    "candidates",
    "llm_features",
    "llm_adapter",
    "server_optimizer",
    "server_state",
    "rows",
    "adapter_delta",
    "logits",
    "slm_logits",
    "slm_features",
    "counts",
    "slm_vocabulary",
]
KINDS: tuple[str, ...] = get_args(ArtifactKind)
"""`proxy_base` is the manifest and each file of the proxy's folder; `model_manifest` and `small_model` are those of a
small model that devices have already; `llm_logits`, `candidates` and `llm_features` are messages of the server; `rows`
and `server_state` are what only the worker reads; from `adapter_delta` on they are what devices sent. What is not
registered as one of them is removed by the sweep of orphans."""

FOR_DEVICES = frozenset(
    {"proxy_base", "model_manifest", "adapter", "probe_set", "llm_vocabulary"}
    | {"llm_logits", "candidates", "llm_features"}
)
"""What a device may fetch: never another device's update, and never the LLM's adapter."""


# Put together once, like the statements of `persistence.assignments`.
_FILE = (
    select(ArtifactRow.sha256, ArtifactRow.size_bytes, RunArtifactRow.kind, RunArtifactRow.run_id)
    .join(RunArtifactRow, RunArtifactRow.sha256 == ArtifactRow.sha256)
    .where(ArtifactRow.sha256 == bindparam("sha256"))
    .order_by(RunArtifactRow.run_id.desc(), RunArtifactRow.kind)
    .limit(1)
)
_FILE_FOR_DEVICE = _FILE.where(
    RunArtifactRow.kind.in_(FOR_DEVICES),
    exists().where(AssignmentRow.run_id == RunArtifactRow.run_id, AssignmentRow.device_id == bindparam("device_id")),
)
_SIZES = select(ArtifactRow.sha256, ArtifactRow.size_bytes).where(
    ArtifactRow.sha256.in_(bindparam("hashes", expanding=True))
)


@dataclass(frozen=True)
class Artifact:
    """A file, with the run and the role in which it was asked for."""

    sha256: str
    size_bytes: int
    kind: str
    run_id: str


def register(  # noqa: PLR0917
    session: Session, sha256: str, size: int, kind: str, run_id: str, now: datetime
) -> None:
    """Say that `run_id` uses the stored file as `kind`. Saying it again changes nothing.

    A `Database` that knows the store commits only if the file is there: see `persistence.orphans`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)}, got {kind!r}")
    insert_or_keep(session, ArtifactRow, {"sha256": sha256, "size_bytes": size, "created_at": now})
    require_blob(session, sha256)
    insert_or_keep(session, RunArtifactRow, {"sha256": sha256, "run_id": run_id, "kind": kind})


def get(session: Session, sha256: str) -> Artifact:
    """Return a file; of several runs that use it, the newest.

    Raises:
        DomainError: ARTIFACT_NOT_FOUND.
    """
    return _first(session.execute(_FILE, {"sha256": sha256}).first(), sha256)


def get_for_device(session: Session, sha256: str, device_id: str) -> Artifact:
    """Return a file that the device may fetch, in the newest run that gave the device work.

    Raises:
        DomainError: ARTIFACT_NOT_FOUND, also where the file exists and is not this device's business.
    """
    return _first(session.execute(_FILE_FOR_DEVICE, {"sha256": sha256, "device_id": device_id}).first(), sha256)


def _first(row: Row[str, int, str, str] | None, sha256: str) -> Artifact:
    if row is None:
        raise DomainError(ErrorCode.ARTIFACT_NOT_FOUND, f"no artifact {sha256} here for you", received=sha256)
    return Artifact(row.sha256, row.size_bytes, row.kind, row.run_id)


def references(session: Session, hashes: Iterable[str | None]) -> dict[str, ArtifactRef]:
    """Return what a client needs in order to fetch each of the files, by hash; nulls are skipped."""
    wanted = {sha256 for sha256 in hashes if sha256 is not None}
    if not wanted:
        return {}
    rows = session.execute(_SIZES, {"hashes": sorted(wanted)})
    return {row.sha256: ArtifactRef(sha256=row.sha256, size_bytes=row.size_bytes) for row in rows}
