"""Updates that come after their round has closed: refused, kept, or used once by a later round (docs/rounds.md).

A round takes the late updates that it uses in the transaction that closes it, so that a stage that is done again after
a kill works on the same ones. `used_in_round_id` is set once and only while it is empty, under the run's lock: that is
why a late update counts in at most one round. Only a round that ends before it has counted them gives them back.
"""

from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from persistence.tables import AssignmentRow, DeviceRow, RoundRow, RunRow, VersionRow
from persistence.transitions import UNDELIVERED
from protocol.assignments import CountsIn
from protocol.statuses import AssignmentStatus, DeviceStatus, RunStatus

OVER = frozenset({RunStatus.COMPLETED, RunStatus.STOPPED})
"""No later round will open; after a failure one may."""


def are_used(run: RunRow) -> bool:
    """Return whether the run's settings let a later round use them."""
    return str(run.config.get("late_updates")) == "next_round"


def told_use(run: RunRow) -> CountsIn:
    """Return what a device is told that becomes of a late update, as in `SubmissionReceipt.counts_in`."""
    return "later_round" if are_used(run) else "no_round"


def refusal(session: Session, run: RunRow, round_row: RoundRow) -> str | None:
    """Say why a late update for this round is not taken any more; None: it is."""
    policy = str(run.config.get("late_updates", "discard"))
    if policy == "discard":
        return "this run does not keep late updates"
    if run.status in OVER:
        return f"the run is {run.status.value}"
    if policy == "keep" or run.latest_version is None:
        return None
    age = versions_between(session, run.id, round_row.base_version, run.latest_version)
    if age is None:
        return f"its base, version {round_row.base_version}, was withdrawn"
    most = int(run.config["max_staleness"])
    return None if age <= most else f"its base is {age} versions old, and max_staleness is {most}"


def versions_between(session: Session, run_id: str, base: int, current: int) -> int | None:
    """Return how many versions `current` is after `base`: those that a round could start from, so promoted ones.

    None: `base` is not among them, because it was withdrawn, or it is later than `current`.
    """
    numbers = session.scalars(
        select(VersionRow.number)
        .where(
            VersionRow.run_id == run_id,
            VersionRow.promoted,
            VersionRow.withdrawn_at.is_(None),
            VersionRow.number.between(base, current),
        )
        .order_by(VersionRow.number)
    ).all()
    return len(numbers) - 1 if numbers and numbers[0] == base else None


def take(session: Session, run: RunRow, row: RoundRow) -> int:
    """Take the late updates that a locked round, which closes now, uses; return how many.

    A revoked device's are left, and those whose base is too old or withdrawn.
    """
    if not are_used(run):
        return 0
    waiting = session.execute(
        select(AssignmentRow, RoundRow.base_version)
        .join(RoundRow, RoundRow.id == AssignmentRow.round_id)
        .join(DeviceRow, DeviceRow.id == AssignmentRow.device_id)
        .where(
            AssignmentRow.run_id == run.id,
            AssignmentRow.status == AssignmentStatus.LATE,
            AssignmentRow.update_sha256.is_not(None),
            AssignmentRow.used_in_round_id.is_(None),
            DeviceRow.status != DeviceStatus.REVOKED,
        )
        .order_by(AssignmentRow.id)
        .with_for_update(of=AssignmentRow, key_share=True)
        .execution_options(populate_existing=True)
    ).all()
    most, taken = int(run.config["max_staleness"]), 0
    for assignment, base in waiting:
        age = versions_between(session, run.id, base, row.base_version)
        if age is not None and age <= most:
            assignment.used_in_round_id, assignment.staleness = row.id, age
            taken += 1
    session.flush()
    return taken


def give_back(session: Session, row: RoundRow) -> None:
    """Let go of the late updates that a locked round took and, ending early, has not counted."""
    taken = select(AssignmentRow).where(
        AssignmentRow.used_in_round_id == row.id, AssignmentRow.status == AssignmentStatus.LATE
    )
    locked = taken.with_for_update(key_share=True).execution_options(populate_existing=True)
    for assignment in session.scalars(locked).all():
        assignment.used_in_round_id = assignment.staleness = None
    session.flush()


def in_round(round_id: str) -> ColumnElement[bool]:
    """The assignments whose updates this round works with: its own that no later round took, and those it took."""
    own = and_(AssignmentRow.round_id == round_id, AssignmentRow.used_in_round_id.is_(None))
    return or_(own, AssignmentRow.used_in_round_id == round_id)


def is_to_count(row: AssignmentRow, round_id: str) -> bool:
    """Return whether this round has the update and has neither counted nor refused it yet."""
    taken = row.status is AssignmentStatus.LATE and row.used_in_round_id == round_id
    return taken or row.status is AssignmentStatus.SUBMITTED


def may_still_come(session: Session, run: RunRow, round_row: RoundRow, row: AssignmentRow) -> bool:
    """Return whether a device should go on although its round has closed."""
    on_the_way = row.status in UNDELIVERED | {AssignmentStatus.LATE, AssignmentStatus.LOST}
    return on_the_way and refusal(session, run, round_row) is None


def keep(session: Session, run: RunRow, row: AssignmentRow, values: dict[str, object], now: datetime) -> None:
    """Store a late submission in its locked assignment, which is and stays `late`."""
    for name, value in {**values, "late_use": told_use(run), "submitted_at": now}.items():
        setattr(row, name, value)
    session.flush()
