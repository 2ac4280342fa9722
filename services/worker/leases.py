"""Holds a job's lease while a stage works, and tells the stage when to give up.

The lease is what makes two deliveries of one message, a killed worker and a stalled worker harmless: the database
gives a job to one owner at a time, and accepts a result only from the owner who still holds it.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog

RENEWALS_PER_LEASE = 4
"""Renewed four times as often as it would run out: three renewals may fail."""

PROGRESS_SECONDS = 10.0
"""Progress is logged at most so often, and at each stage's first step."""

log = structlog.get_logger("worker.leases")


class Abandoned(Exception):
    """The work on a job ends without a result, and without fault: the worker stops, or another one has the job."""


class Lease:
    """Keeps a claimed job ours. Use as a context manager: the renewing thread lives as long as the block.

    Args:
        renew: Extends the lease in the database; False when it is no longer ours. May raise: tried again until the
            lease has run out by our own clock.
        seconds: How long the lease lasts from each renewal.
        stop: Set when the process has been asked to end.
    """

    def __init__(self, renew: Callable[[], bool], seconds: float, stop: threading.Event) -> None:
        self._renew = renew
        self._seconds = seconds
        self._stop = stop
        self._lost = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._logged: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        """Return while it makes sense to go on. Called between steps of the work.

        Raises:
            Abandoned: the lease is lost or the process has been asked to end.
        """
        if self._lost.is_set():
            raise Abandoned("the lease is lost")
        if self._stop.is_set():
            raise Abandoned("the worker stops")

    def on_progress(self, stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
        """`check` and log, in the shape that the training loops call after each step."""
        self.check()
        now = time.monotonic()
        if self._logged is None or self._logged[0] != stage or now - self._logged[1] >= PROGRESS_SECONDS:
            self._logged = (stage, now)
            rounded = {name: round(loss, 4) for name, loss in losses.items()}
            log.info("progress", stage=stage, step=step, steps=steps, **rounded)

    def _keep(self) -> None:
        renewed_at = time.monotonic()
        while not self._over.wait(self._seconds / RENEWALS_PER_LEASE):
            before = time.monotonic()
            try:
                if not self._renew():
                    break
                renewed_at = before
            except Exception as error:  # the database may be away for a moment: the lease outlives that
                log.warning("lease_not_renewed", error=repr(error))
                if time.monotonic() - renewed_at > self._seconds:
                    break
        else:
            return
        log.warning("lease_lost")
        self._lost.set()
