"""The tables of what is trained; `persistence.operator_tables` holds those of who may look and who is told.

Written once, built by `migrations/`; a test keeps the two equal.

A status is never assigned: `persistence.transitions.move` changes it, and the listener at the end of this file refuses
anything else. There are no relationships: every query says what it joins.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    ForeignKey,
    Index,
    Integer,
    String,
    UniqueConstraint,
    event,
    inspect,
)
from sqlalchemy.orm import Mapped, mapped_column

from persistence.column_types import BigInt, FiniteJson, UtcDateTime, status_type
from persistence.table_base import ID, REASON, SHA256, Table
from protocol.assignments import CountsIn
from protocol.errors import ErrorCode
from protocol.events import EventType
from protocol.federations import DEFAULT_FEDERATION
from protocol.statuses import AssignmentStatus, DeviceStatus, JobKind, JobStatus, PartKind, RoundStatus, RunStatus


class FederationRow(Table):
    """Devices that train together. Its name is its identity."""

    __tablename__ = "federations"

    name: Mapped[str] = mapped_column(ID, primary_key=True)
    description: Mapped[str] = mapped_column(String(400), default="")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class EnrolmentTokenRow(Table):
    """A token that lets `uses` devices enrol until `expires_at`. Only its hash is kept."""

    __tablename__ = "enrolment_tokens"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    token_sha256: Mapped[str] = mapped_column(SHA256, unique=True)
    uses: Mapped[int] = mapped_column(Integer)
    used: Mapped[int] = mapped_column(Integer, default=0)
    note: Mapped[str] = mapped_column(String(200), default="")
    approval: Mapped[bool] = mapped_column(Boolean, default=False)
    federations: Mapped[list[str]] = mapped_column(FiniteJson, default=lambda: [DEFAULT_FEDERATION])
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class DeviceRow(Table):
    """An enrolled device. Only hashes of its credential's secret, and of the one that may follow it, are kept."""

    __tablename__ = "devices"
    __table_args__ = (Index(None, "status", "last_seen_at"),)

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    status: Mapped[DeviceStatus] = mapped_column(status_type(DeviceStatus))
    credential_sha256: Mapped[str] = mapped_column(SHA256)
    next_credential_sha256: Mapped[str | None] = mapped_column(SHA256)
    public_key: Mapped[str | None] = mapped_column(String(44))
    token_id: Mapped[str] = mapped_column(ID, ForeignKey("enrolment_tokens.id"))
    profile: Mapped[dict[str, Any]] = mapped_column(FiniteJson)
    activity: Mapped[str] = mapped_column(String(64), default="idle")
    reason: Mapped[str | None] = mapped_column(String(400))
    enrolled_at: Mapped[datetime] = mapped_column(UtcDateTime)
    last_seen_at: Mapped[datetime] = mapped_column(UtcDateTime)


class FederationDeviceRow(Table):
    """A device belongs to a federation."""

    __tablename__ = "federation_devices"

    federation: Mapped[str] = mapped_column(ID, ForeignKey("federations.name"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ID, ForeignKey("devices.id"), primary_key=True, index=True)
    joined_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ArtifactRow(Table):
    """A file of the blob store, by content."""

    __tablename__ = "artifacts"

    sha256: Mapped[str] = mapped_column(SHA256, primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class RunRow(Table):
    """A run. `config` never changes; `proxy_*`, `probe_set_sha256`, `llm_vocabulary_sha256` and `expected_tensors` come
    from its preparation."""

    __tablename__ = "runs"
    __table_args__ = (Index(None, "status"), Index(None, "federation"))

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    federation: Mapped[str] = mapped_column(ID, ForeignKey("federations.name"), default=DEFAULT_FEDERATION)
    status: Mapped[RunStatus] = mapped_column(status_type(RunStatus))
    status_reason: Mapped[str | None] = mapped_column(REASON)
    error_code: Mapped[ErrorCode | None] = mapped_column(status_type(ErrorCode))
    config: Mapped[dict[str, Any]] = mapped_column(FiniteJson)
    device_ids: Mapped[list[str] | None] = mapped_column(FiniteJson)
    max_updates: Mapped[int | None] = mapped_column(BigInteger)
    current_round: Mapped[int] = mapped_column(Integer, default=0)
    latest_version: Mapped[int | None] = mapped_column(Integer)
    proxy_manifest_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    probe_set_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    llm_vocabulary_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    expected_tensors: Mapped[dict[str, Any] | None] = mapped_column(FiniteJson)
    paused_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    paused_by: Mapped[str | None] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class RunArtifactRow(Table):
    """Which run uses a file, and as what."""

    __tablename__ = "run_artifacts"

    sha256: Mapped[str] = mapped_column(SHA256, ForeignKey("artifacts.sha256"), primary_key=True)
    run_id: Mapped[str] = mapped_column(ID, ForeignKey("runs.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), primary_key=True)


class RoundRow(Table):
    """An attempt at a round: what it started from, what each stage made, and until when it waits."""

    __tablename__ = "rounds"
    __table_args__ = (UniqueConstraint("run_id", "number", "attempt"), Index(None, "status"))

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    run_id: Mapped[str] = mapped_column(ID, ForeignKey("runs.id"))
    number: Mapped[int] = mapped_column(Integer)
    attempt: Mapped[int] = mapped_column(Integer, default=1)
    status: Mapped[RoundStatus] = mapped_column(status_type(RoundStatus))
    status_reason: Mapped[str | None] = mapped_column(REASON)
    base_version: Mapped[int] = mapped_column(Integer)
    base_adapter_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    base_llm_adapter_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    base_message_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    base_server_state_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    aggregated_adapter_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    server_optimizer_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    candidate_adapter_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    candidate_llm_adapter_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    candidate_message_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    candidate_server_state_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    metrics: Mapped[dict[str, Any]] = mapped_column(FiniteJson, default=dict)
    opened_at: Mapped[datetime] = mapped_column(UtcDateTime)
    deadline_at: Mapped[datetime] = mapped_column(UtcDateTime)
    sampling_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    grace_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    closed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class AssignmentRow(Table):
    """One device's share of one round, and its update once submitted.

    `late_use` is what the device was told that becomes of its late update; `used_in_round_id` the later round that has
    taken it, once.
    """

    __tablename__ = "assignments"
    __table_args__ = (
        UniqueConstraint("round_id", "device_id"),
        Index(None, "device_id", "status"),
        Index(None, "run_id", "status"),
        Index(None, "used_in_round_id"),
    )

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    run_id: Mapped[str] = mapped_column(ID, ForeignKey("runs.id"))
    round_id: Mapped[str] = mapped_column(ID, ForeignKey("rounds.id"))
    device_id: Mapped[str] = mapped_column(ID, ForeignKey("devices.id"))
    status: Mapped[AssignmentStatus] = mapped_column(status_type(AssignmentStatus))
    reason: Mapped[str | None] = mapped_column(REASON)
    adapter_rank: Mapped[int | None] = mapped_column(Integer)
    stage: Mapped[str | None] = mapped_column(String(64))
    step: Mapped[int | None] = mapped_column(BigInteger)
    steps: Mapped[int | None] = mapped_column(BigInteger)
    losses: Mapped[dict[str, float]] = mapped_column(FiniteJson, default=dict)
    num_examples: Mapped[int | None] = mapped_column(BigInteger)
    metrics: Mapped[dict[str, Any]] = mapped_column(FiniteJson, default=dict)
    update_sha256: Mapped[str | None] = mapped_column(SHA256)
    late_use: Mapped[CountsIn | None] = mapped_column(String(16))
    used_in_round_id: Mapped[str | None] = mapped_column(ID, ForeignKey("rounds.id"))
    staleness: Mapped[int | None] = mapped_column(Integer)
    offered_at: Mapped[datetime] = mapped_column(UtcDateTime)
    submitted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class UpdatePartRow(Table):
    """One received file of an update."""

    __tablename__ = "update_parts"

    assignment_id: Mapped[str] = mapped_column(ID, ForeignKey("assignments.id"), primary_key=True)
    kind: Mapped[PartKind] = mapped_column(status_type(PartKind), primary_key=True)
    sha256: Mapped[str] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    received_at: Mapped[datetime] = mapped_column(UtcDateTime)


class PartUploadRow(Table):
    """A file of an update that is on its way in chunks: at most one for each part."""

    __tablename__ = "part_uploads"
    __table_args__ = (UniqueConstraint("assignment_id", "kind"), Index(None, "touched_at"))

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    assignment_id: Mapped[str] = mapped_column(ID, ForeignKey("assignments.id"))
    kind: Mapped[PartKind] = mapped_column(status_type(PartKind))
    sha256: Mapped[str] = mapped_column(SHA256)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    chunk_bytes: Mapped[int] = mapped_column(BigInteger)
    received_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    begun_at: Mapped[datetime] = mapped_column(UtcDateTime)
    touched_at: Mapped[datetime] = mapped_column(UtcDateTime)


class UploadChunkRow(Table):
    """A chunk that was received; its bytes are staged in the blob store. Chunk n starts at n * `chunk_bytes`."""

    __tablename__ = "upload_chunks"

    upload_id: Mapped[str] = mapped_column(ID, ForeignKey("part_uploads.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    sha256: Mapped[str] = mapped_column(SHA256)
    size_bytes: Mapped[int] = mapped_column(BigInteger)


class VersionRow(Table):
    """A model version. Number n comes from round n; 0 from the preparation. `parent` is what its round started from.

    With its adapters go what the server sends devices for the rounds that start from it, and what it keeps for them.
    """

    __tablename__ = "versions"

    run_id: Mapped[str] = mapped_column(ID, ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    round_id: Mapped[str | None] = mapped_column(ID, ForeignKey("rounds.id"), unique=True)
    promoted: Mapped[bool] = mapped_column(Boolean)
    proxy_adapter_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    llm_adapter_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    message_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    server_state_sha256: Mapped[str | None] = mapped_column(SHA256, ForeignKey("artifacts.sha256"))
    num_updates: Mapped[int] = mapped_column(Integer)
    parent: Mapped[int | None] = mapped_column(Integer)
    withdrawn_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    withdrawn_reason: Mapped[str | None] = mapped_column(REASON)
    metrics: Mapped[dict[str, Any]] = mapped_column(FiniteJson, default=dict)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class JobRow(Table):
    """The outbox: work for a worker. One job a kind and subject (a round, or a run for the preparation)."""

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("kind", "subject_id"), Index(None, "status", "sent_at"), Index(None, "run_id"))

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    kind: Mapped[JobKind] = mapped_column(status_type(JobKind))
    subject_id: Mapped[str] = mapped_column(ID)
    run_id: Mapped[str] = mapped_column(ID, ForeignKey("runs.id"))
    round_id: Mapped[str | None] = mapped_column(ID, ForeignKey("rounds.id"))
    status: Mapped[JobStatus] = mapped_column(status_type(JobStatus))
    reason: Mapped[str | None] = mapped_column(REASON)
    owner: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    queued_at: Mapped[datetime] = mapped_column(UtcDateTime)
    status_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    sent_at: Mapped[datetime] = mapped_column(UtcDateTime)
    traceparent: Mapped[str | None] = mapped_column(String(64))
    """Of the request or the job that made this one necessary, where traces are on."""
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class EventRow(Table):
    """The append-only feed. `sequence` is given in commit order: see `persistence.events`."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "run_id", "sequence"),)

    sequence: Mapped[int] = mapped_column(BigInt, primary_key=True)
    type: Mapped[EventType] = mapped_column(status_type(EventType))
    time: Mapped[datetime] = mapped_column(UtcDateTime)
    run_id: Mapped[str | None] = mapped_column(ID, ForeignKey("runs.id"))
    round_id: Mapped[str | None] = mapped_column(ID, ForeignKey("rounds.id"))
    device_id: Mapped[str | None] = mapped_column(ID, ForeignKey("devices.id"))
    data: Mapped[dict[str, Any]] = mapped_column(FiniteJson, default=dict)


class TrafficRow(Table):
    """Bytes of bodies between one device and the cloud for one run."""

    __tablename__ = "traffic"

    run_id: Mapped[str] = mapped_column(ID, ForeignKey("runs.id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ID, ForeignKey("devices.id"), primary_key=True)
    direction: Mapped[str] = mapped_column(String(8), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    num_bytes: Mapped[int] = mapped_column(BigInteger)


def _refuse_assignment_to_status(row: Table, value: object, old: object, _initiator: object) -> None:
    if inspect(row).persistent:
        raise AttributeError(f"a status is changed by transitions.move, not by assignment ({old} to {value})")


for _table in (DeviceRow, RunRow, RoundRow, AssignmentRow, JobRow):
    event.listen(_table.status, "set", _refuse_assignment_to_status)
