"""The periodic look at the database: whatever a lost message or a silent device would leave waiting is moved on here.

Five transactions, so that one that fails does not undo the others.
"""

from datetime import datetime, timedelta

import structlog

from persistence import devices, idempotency, jobs, part_uploads, rounds
from persistence.blobs import BlobStore
from persistence.database import Database, queue_message
from persistence.orphans import remove_left_stages, remove_orphans
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


def sweep_store(settings: Settings, database: Database, blobs: BlobStore, now: datetime) -> None:
    """Forget uploads that nobody goes on with, and remove from the blob store what nothing refers to.

    It reads a list of all files, so it is done less often than `sweep`. Why it takes nothing from anybody:
    `persistence.orphans`.
    """
    before = now - timedelta(seconds=settings.orphan_grace_seconds)
    with database.transaction() as session:
        idle = part_uploads.forget_idle(session, now)
    for upload_id in idle:
        blobs.drop_stage(upload_id)
    stages = remove_left_stages(database, blobs, before)
    orphans = remove_orphans(database, blobs, before, now)
    unfinished = blobs.remove_unfinished(before)
    if idle or stages or orphans or unfinished:
        log.info("store_swept", idle_uploads=len(idle), stages=stages, orphans=orphans, unfinished=unfinished)
