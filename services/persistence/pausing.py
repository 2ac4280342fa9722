"""How a run is held, and what holding does to its clock."""

from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from persistence.run_config import config_of
from persistence.table_base import shorten
from persistence.tables import RoundRow, RunRow
from persistence.transitions import TAKES_UPDATES, move
from protocol.statuses import RunStatus


def pause(session: Session, run: RunRow, *, by: str, reason: str, now: datetime) -> None:
    """Move a locked, running run to `paused`.

    No round opens or closes and nothing is offered from now on. What devices and workers have, they may finish.

    Raises:
        IllegalTransition: it is not running.
    """
    reason = shorten(reason) or ""
    values = {"status_reason": reason, "paused_at": now, "paused_by": by}
    move(session, run, RunStatus.PAUSED, now=now, reason=f"{by}: {reason}", values=values)


def go_on(session: Session, run: RunRow, *, reason: str, now: datetime) -> RoundRow | None:
    """Move a locked, paused run to `running`; return its round if that still collects.

    The pause does not count: the round's deadlines move by its length. A sampling deadline that had passed starts anew,
    or it would pause the run again at once.
    """
    held = now - run.paused_at if run.paused_at is not None else timedelta(0)
    values = {"status_reason": None, "paused_at": None, "paused_by": None}
    move(session, run, RunStatus.RUNNING, now=now, reason=reason, values=values)
    row = session.scalar(
        select(RoundRow)
        .where(RoundRow.run_id == run.id, RoundRow.status.in_(TAKES_UPDATES))
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    if row is None:
        return None
    row.deadline_at += held
    if row.grace_until is not None:
        row.grace_until += held
    if row.sampling_until is not None:
        row.sampling_until += held
        window = config_of(run).sampling_deadline_seconds
        if row.sampling_until <= now and window is not None:
            row.sampling_until = now + timedelta(seconds=window)
            row.deadline_at = max(row.deadline_at, row.sampling_until)
    session.flush()
    return row
