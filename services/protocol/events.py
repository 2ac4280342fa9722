"""The append-only feed: every transition and everything worth telling, in order."""

from enum import StrEnum
from typing import Any

from pydantic import Field

from protocol.base import ResponseModel, Timestamp


class EventType(StrEnum):
    """Every kind of event."""

    RUN_CREATED = "run.created"
    RUN_STATUS_CHANGED = "run.status_changed"
    RUN_ROLLED_BACK = "run.rolled_back"
    ROUND_OPENED = "round.opened"
    ROUND_STATUS_CHANGED = "round.status_changed"
    ROUND_METRICS = "round.metrics"
    ASSIGNMENT_STATUS_CHANGED = "assignment.status_changed"
    UPDATE_SUBMITTED = "update.submitted"
    UPDATE_REJECTED = "update.rejected"
    UPDATE_QUARANTINED = "update.quarantined"
    VERSION_CREATED = "version.created"
    FEDERATION_CREATED = "federation.created"
    FEDERATION_DELETED = "federation.deleted"
    FEDERATION_DEVICE_ADDED = "federation.device_added"
    FEDERATION_DEVICE_REMOVED = "federation.device_removed"
    DEVICE_ENROLLED = "device.enrolled"
    DEVICE_STATUS_CHANGED = "device.status_changed"
    JOB_QUEUED = "job.queued"
    JOB_CLAIMED = "job.claimed"
    JOB_RESENT = "job.resent"
    JOB_DONE = "job.done"
    JOB_FAILED = "job.failed"


class Event(ResponseModel):
    """One fact. `sequence` grows; give the last one seen back as `after` or `Last-Event-ID`."""

    sequence: int
    type: EventType
    time: Timestamp
    run_id: str | None = None
    round_id: str | None = None
    device_id: str | None = None
    data: dict[str, Any] = Field(
        default_factory=dict, description="`from`, `to`, `reason`, numbers. Never device text."
    )
