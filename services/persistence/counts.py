"""How many there are of everything, by status: what a monitoring system asks for every few seconds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from persistence import sweeping, traffic
from persistence.tables import AssignmentRow, DeviceRow, JobRow, RoundRow, RunRow
from protocol.statuses import AssignmentStatus, DeviceStatus, JobKind, JobStatus, RoundStatus, RunStatus

Statuses = Mapping[str, int]


@dataclass(frozen=True)
class Counts:
    """Rows by status. Statuses that none has are there too, with 0.

    Attributes:
        runs, rounds, devices, assignments: by status.
        jobs: by kind and status.
        num_bytes: by direction and kind.
        sweep_age_seconds: since a controller last swept; infinity if none has.
    """

    runs: Statuses
    rounds: Statuses
    devices: Statuses
    assignments: Statuses
    jobs: Mapping[tuple[str, ...], int]
    num_bytes: Mapping[tuple[str, ...], int]
    sweep_age_seconds: float


def count_everything(session: Session) -> Counts:
    """Count, in eight statements."""
    jobs: dict[tuple[str, ...], int] = {(kind.value, status.value): 0 for kind in JobKind for status in JobStatus}
    for kind, status, number in session.execute(
        select(JobRow.kind, JobRow.status, func.count()).group_by(JobRow.kind, JobRow.status)
    ):
        jobs[kind.value, status.value] = number
    since_sweep = sweeping.seconds_since_sweep(session)
    return Counts(
        runs=_by_status(session, RunRow.status, RunStatus),
        rounds=_by_status(session, RoundRow.status, RoundStatus),
        devices=_by_status(session, DeviceRow.status, DeviceStatus),
        assignments=_by_status(session, AssignmentRow.status, AssignmentStatus),
        jobs=jobs,
        num_bytes=traffic.sums(session),
        sweep_age_seconds=math.inf if since_sweep is None else since_sweep,
    )


def _by_status(session: Session, column: Any, statuses: type[StrEnum]) -> Statuses:
    found: dict[StrEnum, int] = dict(session.execute(select(column, func.count()).group_by(column)).all())
    return {status.value: found.get(status, 0) for status in statuses}
