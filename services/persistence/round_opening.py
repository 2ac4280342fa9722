"""Which round a run plays next, and from which version."""

from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from persistence import events
from persistence.identifiers import new_id
from persistence.run_config import config_of
from persistence.tables import RoundRow, RunRow, VersionRow
from persistence.transitions import UNFINISHED_ROUND, move
from protocol.events import EventType
from protocol.runs import RunCreate
from protocol.statuses import RoundStatus, RunStatus


def newest_round(session: Session, run_id: str) -> RoundRow | None:
    """Return the newest attempt at the newest round of a run; None before the first."""
    return session.scalar(
        select(RoundRow)
        .where(RoundRow.run_id == run_id)
        .order_by(RoundRow.number.desc(), RoundRow.attempt.desc())
        .limit(1)
        .execution_options(populate_existing=True)
    )


def open_next_round(session: Session, run: RunRow, now: datetime) -> None:
    """Open the next round of a locked, running run, or complete the run after its last one.

    It starts from the newest version that was promoted and not withdrawn. After a round that failed or was abandoned
    the same one is opened again, as another attempt. Nothing happens while a round is unfinished.
    """
    newest = newest_round(session, run.id)
    if newest is not None and newest.status in UNFINISHED_ROUND:
        return
    config = config_of(run)
    if newest is None:
        number, attempt = 1, 1
    elif newest.status is RoundStatus.PUBLISHED:
        number, attempt = newest.number + 1, 1
    else:
        number, attempt = newest.number, newest.attempt + 1
    if number > config.rounds:
        reason = f"all {config.rounds} rounds are done"
        values = {"finished_at": now, "status_reason": reason}
        move(session, run, RunStatus.COMPLETED, now=now, reason=reason, values=values)
        return
    session.flush()
    base = session.get_one(VersionRow, (run.id, run.latest_version))
    _open(session, run, config, base, number=number, attempt=attempt, now=now)


def _open(
    session: Session, run: RunRow, config: RunCreate, base: VersionRow, *, number: int, attempt: int, now: datetime
) -> None:
    sampling = config.sampling_deadline_seconds
    row = RoundRow(
        id=new_id("rnd", now),
        run_id=run.id,
        number=number,
        attempt=attempt,
        status=RoundStatus.OPEN,
        base_version=base.number,
        base_adapter_sha256=base.proxy_adapter_sha256,
        base_llm_adapter_sha256=base.llm_adapter_sha256,
        base_message_sha256=base.message_sha256,
        base_server_state_sha256=base.server_state_sha256,
        metrics={},
        opened_at=now,
        deadline_at=now + timedelta(seconds=config.round_deadline_seconds),
        sampling_until=None if sampling is None else now + timedelta(seconds=sampling),
    )
    session.add(row)
    run.current_round = number
    session.flush()
    data = {
        "number": number,
        "attempt": attempt,
        "base_version": base.number,
        "deadline_at": row.deadline_at.isoformat(),
    }
    events.append(session, EventType.ROUND_OPENED, now, run_id=run.id, round_id=row.id, data=data)
