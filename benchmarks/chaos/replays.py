"""Sends the signed requests of runs that are over once more: nothing of the runs may change (but see `snapshot`).

First as they are: the service knows their nonces, unless it lost them in a kill. Then after the API was killed and
Redis was flushed, so that no nonce is known any more and only what the requests ask for protects.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from benchmarks.chaos.cloud import API, Cloud
from benchmarks.chaos.history import as_of_one_moment
from benchmarks.chaos.network import SpoilingProxy
from persistence.table_base import Table
from persistence.tables import (
    AssignmentRow,
    EventRow,
    JobRow,
    PartUploadRow,
    RoundRow,
    RunArtifactRow,
    RunRow,
    UpdatePartRow,
    UploadChunkRow,
    VersionRow,
)
from protocol.events import EventType
from protocol.statuses import AssignmentStatus

TABLES = (
    *(RunRow, RoundRow, AssignmentRow, VersionRow, JobRow),
    *(UpdatePartRow, PartUploadRow, UploadChunkRow, RunArtifactRow),
)
Snapshot = dict[str, object]


@dataclass
class Replays:
    """One cloud, and the proxy through which its devices spoke."""

    cloud: Cloud
    proxy: SpoilingProxy

    def send(self) -> tuple[dict[str, dict[str, int]], list[str]]:
        """Send every request twice; return what was answered, and what changed or failed."""
        known = self.proxy.seen.requests.copy()
        before = self.cloud.read(snapshot)
        answers = {"in their runs": dict(self.proxy.seen.replays.most_common()), "nonces known": self._send(known)}
        self._forget_nonces()
        answers["nonces forgotten"] = self._send(known)
        after = self.cloud.read(snapshot)
        changed = [
            f"replays changed {name}: {_difference(before[name], after[name])}"
            for name in before
            if before[name] != after[name]
        ]
        return answers, changed + self.proxy.seen.take_faults()

    def _send(self, requests: object) -> dict[str, int]:
        answers: Counter[str] = self.proxy.send_again(requests)  # type: ignore[arg-type]
        return dict(answers.most_common())

    def _forget_nonces(self) -> None:
        before = self.cloud.starts(API)
        self.cloud.kill(API)
        self.cloud.wait("another API", lambda: self.cloud.starts(API) > before or None)
        self.cloud.ask("GET", "/ready")
        if self.cloud.redis is not None:
            self.cloud.redis.flush()


def _difference(before: object, after: object) -> str:
    """Name the rows that differ."""
    if not isinstance(before, list) or not isinstance(after, list):
        return f"{before!r} -> {after!r}"
    gone, new = [row for row in before if row not in after], [row for row in after if row not in before]
    return f"{gone[:2]!r} -> {new[:2]!r}"


def snapshot(session: Session) -> Snapshot:
    """Return every row about runs and the numbers of their events, but for what is told to who comes too late.

    A lost assignment becomes late when something of it comes after all: that a request is heard which was said before,
    and whose nonce nobody knows any more, is all that it can do.
    """
    as_of_one_moment(session)
    rows: Snapshot = {
        table.__tablename__: sorted((_told(table, row) for row in session.execute(select(table.__table__))), key=repr)
        for table in TABLES
    }
    known = session.execute(select(EventRow.sequence, EventRow.type, EventRow.data).where(EventRow.run_id.is_not(None)))
    return rows | {"events": [sequence for sequence, kind, data in known if not _says_late(kind, data)]}


def _told(table: type[Table], row: Row[Any]) -> tuple[object, ...]:
    if table is AssignmentRow and row.status is AssignmentStatus.LATE and row.submitted_at is None:
        return tuple((dict(row._mapping) | {"status": AssignmentStatus.LOST, "reason": None}).values())
    if table is AssignmentRow and row.status is AssignmentStatus.LOST:
        return tuple((dict(row._mapping) | {"reason": None}).values())
    return tuple(row)


def _says_late(kind: EventType, data: Mapping[str, object]) -> bool:
    return kind is EventType.ASSIGNMENT_STATUS_CHANGED and data.get("to") == AssignmentStatus.LATE
