"""Which controller sweeps, and when one last did.

Several controllers may run, so that one can fail. A single row says whose turn it is, by lease: the others look at it
and wait. Two that sweep at once (a lease that ran out under a long sweep) do each other no harm, since each transaction
of a sweep locks what it changes; the row spares work and lets others see that somebody sweeps. Rejected: PostgreSQL's
advisory locks, which SQLite has not, and which nobody can ask when they were last held.
"""

from datetime import datetime, timedelta

from sqlalchemy import CursorResult, or_, update
from sqlalchemy.orm import Session

from persistence.clock import database_now
from persistence.inserting import insert_or_keep
from persistence.operator_tables import SweepRow

_ID = "sweep"


def take_turn(session: Session, owner: str, lease_seconds: float, now: datetime) -> bool:
    """Make it `owner`'s turn for so long, if it is not another's. Return whether it is."""
    insert_or_keep(session, SweepRow, {"id": _ID, "owner": owner, "lease_until": now, "swept_at": None})
    statement = (
        update(SweepRow)
        .where(SweepRow.id == _ID, or_(SweepRow.owner == owner, SweepRow.lease_until <= now))
        .values(owner=owner, lease_until=now + timedelta(seconds=lease_seconds))
    )
    result = session.execute(statement, execution_options={"synchronize_session": False})
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def record_sweep(session: Session, now: datetime) -> None:
    """Remember that a sweep was done."""
    session.execute(update(SweepRow).where(SweepRow.id == _ID).values(swept_at=now))


def end_turn(session: Session, owner: str, now: datetime) -> None:
    """Let another one sweep at once, if it is `owner`'s turn."""
    mine = (SweepRow.id == _ID, SweepRow.owner == owner)
    session.execute(update(SweepRow).where(*mine).values(lease_until=now))


def seconds_since_sweep(session: Session) -> float | None:
    """Return how long ago the last sweep was; None if there was none."""
    row = session.get(SweepRow, _ID)
    return None if row is None or row.swept_at is None else (database_now(session) - row.swept_at).total_seconds()


def missing_controller(session: Session) -> str | None:
    """Say in words that no controller sweeps; None if one does."""
    row = session.get(SweepRow, _ID)
    if row is not None and row.lease_until > database_now(session):
        return None
    since = seconds_since_sweep(session)
    last = "none has swept yet" if since is None else f"the last sweep was {since:.0f} s ago"
    return f"no controller sweeps, {last}"
