"""A picture of all open work: for whom there may be something, without a look at the database for each who asks."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from persistence.round_lifecycle import SUBMITTED
from persistence.tables import AssignmentRow, RoundRow, RunRow
from persistence.transitions import TAKES_UPDATES, UNDELIVERED
from protocol.statuses import RunStatus


@dataclass(frozen=True)
class OpenRound:
    """A round that offers work, or whose devices may finish theirs.

    Attributes:
        device_ids: the run's devices; None: any.
        has_place: whether one more device may join: the run is not paused, and `max_updates` leaves room.
        assigned: devices that have an assignment of it, whatever became of that.
        delivering: those of them that have not delivered yet.
    """

    device_ids: frozenset[str] | None
    has_place: bool
    assigned: frozenset[str]
    delivering: frozenset[str]


@dataclass(frozen=True)
class OpenWork:
    """All rounds that offer work."""

    rounds: Sequence[OpenRound]

    def may_concern(self, device_id: str) -> bool:
        """Return whether `assignments.next_assignment` may have something for the device; False: it has nothing.

        It may also be True for nothing: federations and deadlines are not looked at.
        """
        return any(
            device_id in each.delivering
            or (
                each.has_place
                and device_id not in each.assigned
                and (each.device_ids is None or device_id in each.device_ids)
            )
            for each in self.rounds
        )


def look(session: Session) -> OpenWork:
    """Read the open rounds and their assignments, in two statements."""
    rounds = session.execute(
        select(RoundRow.id, RunRow.device_ids, RunRow.max_updates, RunRow.status)
        .join(RunRow, RunRow.id == RoundRow.run_id)
        .where(RoundRow.status.in_(TAKES_UPDATES), RunRow.status.in_((RunStatus.RUNNING, RunStatus.PAUSED)))
    ).all()
    if not rounds:
        return OpenWork(())
    assigned: dict[str, set[str]] = {row.id: set() for row in rounds}
    delivering: dict[str, set[str]] = {row.id: set() for row in rounds}
    taken = dict.fromkeys(assigned, 0)
    found = session.execute(
        select(AssignmentRow.round_id, AssignmentRow.device_id, AssignmentRow.status).where(
            AssignmentRow.round_id.in_(assigned)
        )
    )
    for round_id, device_id, status in found:
        assigned[round_id].add(device_id)
        if status in UNDELIVERED:
            delivering[round_id].add(device_id)
        if status in UNDELIVERED or status in SUBMITTED:
            taken[round_id] += 1
    return OpenWork(
        [
            OpenRound(
                device_ids=None if row.device_ids is None else frozenset(row.device_ids),
                has_place=row.status is RunStatus.RUNNING
                and (row.max_updates is None or row.max_updates > taken[row.id]),
                assigned=frozenset(assigned[row.id]),
                delivering=frozenset(delivering[row.id]),
            )
            for row in rounds
        ]
    )
