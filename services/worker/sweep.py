"""The periodic look at the database: whatever a lost message or a silent device would leave waiting is moved on here.

Five transactions, so that one that fails does not undo the others.
"""

from datetime import datetime

import structlog

from persistence import devices, idempotency, jobs, rounds
from persistence.database import Database, queue_message
from worker.settings import Settings

log = structlog.get_logger("worker.sweep")


def sweep(settings: Settings, database: Database, now: datetime) -> None:
    """Do one sweep: close rounds, mark lost assignments and silent devices, send waiting jobs again, forget answers."""
    with database.transaction() as session:
        closed = rounds.close_due_rounds(session, now)
    with database.transaction() as session:
        lost = rounds.mark_lost_assignments(session, now)
    with database.transaction() as session:
        silent = devices.mark_silent_devices(session, now, settings.offline_after_seconds)
    with database.transaction() as session:
        resent = jobs.due_for_sending(session, now, settings.resend_after_seconds)
        jobs.mark_sent(session, [message.job_id for message in resent], now)
        for message in resent:
            queue_message(session, message)
    with database.transaction() as session:
        idempotency.forget_old(session, now)
    if closed or lost or silent or resent:
        log.info("swept", closed=closed, lost=lost, silent=silent, resent=len(resent))
