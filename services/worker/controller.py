"""The controller's loop: a sweep every few seconds, on a timer of its own.

It needs the database and nothing else. While the broker is away, rounds are closed and devices told as ever; jobs that
cannot be sent are sent again later. (The sweep was a message in a queue before: without a broker there was none.)
"""

import threading
import time
from dataclasses import dataclass

import structlog

from persistence import sweeping
from persistence.blobs import BlobStore
from persistence.clock import database_now
from persistence.database import Database
from protocol.errors import DomainError
from worker.settings import Settings
from worker.sweep import sweep, sweep_store

TURN_SWEEPS = 3
"""A controller that has not swept for so many intervals is replaced by another one."""

SHORTEST_TURN_SECONDS = 10.0

log = structlog.get_logger("worker.controller")


@dataclass
class Controller:
    """Sweeps, as long as it is this process's turn (`persistence.sweeping`)."""

    settings: Settings
    database: Database
    blobs: BlobStore
    owner: str
    """Names this process; unique for each start of one."""
    _store_swept_at: float | None = None

    def run(self, stop: threading.Event) -> None:
        """Sweep every `settings.sweep_seconds` until `stop`; whatever goes wrong is logged and tried again."""
        while not stop.is_set():
            started = time.monotonic()
            try:
                self.sweep_once()
            except DomainError as error:
                log.warning("sweep_failed", reason=error.detail)
            except Exception:  # the top of a loop that must not end
                log.exception("sweep_crashed")
            stop.wait(max(0.05, self.settings.sweep_seconds - (time.monotonic() - started)))
        self._end_turn()

    def sweep_once(self) -> bool:
        """Sweep, unless another controller does. The blob store is swept every `settings.orphan_sweep_seconds`.

        Raises:
            DomainError: UNAVAILABLE, the database or the blob store does not answer.
        """
        turn_seconds = max(TURN_SWEEPS * self.settings.sweep_seconds, SHORTEST_TURN_SECONDS)
        with self.database.transaction() as session:
            now = database_now(session)
            if not sweeping.take_turn(session, self.owner, turn_seconds, now):
                return False
        sweep(self.settings, self.database, now)
        with self.database.transaction() as session:
            sweeping.record_sweep(session, database_now(session))
        due_at = (self._store_swept_at or 0.0) + self.settings.orphan_sweep_seconds
        if self._store_swept_at is None or time.monotonic() >= due_at:
            self._store_swept_at = time.monotonic()
            sweep_store(self.settings, self.database, self.blobs, now)
        return True

    def _end_turn(self) -> None:
        try:
            with self.database.transaction() as session:
                sweeping.end_turn(session, self.owner, database_now(session))
        except DomainError as error:  # the turn ends by itself
            log.warning("turn_not_ended", reason=error.detail)
