"""The two processes: the trainer, which does the jobs, and the controller, which sweeps and needs no torch."""

import threading

import celery
import structlog
from sqlalchemy.exc import OperationalError

from persistence import schema
from persistence.blobs import BlobStore, open_store
from persistence.database import Database
from persistence.errors import StorageError
from protocol.exit_codes import ServiceExit
from protocol.statuses import TRAINING_QUEUE
from worker import webhook_sender
from worker.celery_app import consume, make_app, request_stop, sender
from worker.controller import Controller
from worker.settings import Settings
from worker.stalls import Guard
from worker.stopping import end_process, watch_signals
from worker.tasks import JobRunner, register_jobs

log = structlog.get_logger("worker.processes")

GRACE_LEASES = 2
"""A worker that stands still has so many leases' time to say why and end itself before the watchdog kills it."""

WEBHOOK_SECONDS = 1.0
"""Between two looks for events that webhooks have not been told of."""


def run_trainer(settings: Settings, owner: str, stop: threading.Event) -> int:
    """Do jobs, one at a time, until SIGTERM or SIGINT, or until one has left this process unfit; return the exit code.

    Raises:
        StorageError: the database or the blob store cannot be used.
    """
    watch_signals(stop, request_stop)
    guard = Guard(GRACE_LEASES * settings.lease_seconds)  # early, while there is memory
    app, database, blobs = _connect(settings)

    def end() -> None:
        log.error("worker_damaged")
        stop.set()
        request_stop(ServiceExit.FAULT)

    runner = JobRunner(
        settings,
        database,
        blobs,
        owner,
        stop,
        on_damage=end,
        on_stall=lambda: end_process(ServiceExit.STALLED),
        promise=guard.expect,
    )
    register_jobs(app, runner)
    return consume(app, TRAINING_QUEUE, settings, node=f"trainer@{owner}")


def run_controller(settings: Settings, owner: str, stop: threading.Event) -> int:
    """Sweep every `settings.sweep_seconds` until SIGTERM or SIGINT; return the exit code.

    Raises:
        StorageError: the database or the blob store cannot be used.
    """
    watch_signals(stop, lambda: None)
    _, database, blobs = _connect(settings)
    webhook_sender.start(database, WEBHOOK_SECONDS, stop)
    log.info("sweeping", every_seconds=settings.sweep_seconds)
    Controller(settings, database, blobs, owner).run(stop)
    return 0


def _connect(settings: Settings) -> tuple[celery.Celery, Database, BlobStore]:
    try:
        schema.upgrade(settings.database_url)  # whoever starts first does it, the others wait
    except OperationalError as error:
        reason = str(error.orig).strip().splitlines()
        raise StorageError(f"the database does not answer: {reason[0] if reason else 'no reason given'}") from None
    app = make_app(settings)
    blobs = open_store(settings.blobs, settings.home / "scratch")
    return app, Database(settings.database_url, dispatch=sender(app), stored=blobs.exists), blobs
