"""Holds a job's lease while a stage works, and tells the stage when to give up.

The lease is what makes two deliveries of one message, a killed worker and a stalled worker harmless: the database
gives a job to one owner at a time, and accepts a result only from the owner who still holds it.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Silence:
    """How long a stage may show no progress, and who is told. Times in seconds.

    Without one a lease is renewed as long as its block lasts.
    """

    step_seconds: float = math.inf
    """Between two marks."""
    long_call_seconds: float = math.inf
    """In a block that is known to be one long call."""
    on_stall: Callable[[str], None] = lambda reason: None
    """Called in the renewing thread, which renews no more, with what happened in words."""
    promise: Callable[[float], None] = lambda seconds: None
    """Called with the seconds within which the next mark will come; infinity after the block."""


@dataclass(frozen=True)
class _Mark:
    at: float
    doing: str
    seconds: float
    """How long it may be the last one."""


class Lease:
    """Keeps a claimed job ours. Use as a context manager: the renewing thread lives as long as the block.

    Args:
        renew: Extends the lease in the database; False when it is no longer ours. May raise: tried again until the
            lease has run out by our own clock.
        seconds: How long the lease lasts from each renewal.
        stop: Set when the process has been asked to end.
        silence: When the work counts as standing still, so that the lease is no longer renewed.
    """

    def __init__(
        self, renew: Callable[[], bool], seconds: float, stop: threading.Event, silence: Silence = Silence()
    ) -> None:
        self._renew = renew
        self._seconds = seconds
        self._stop = stop
        self._silence = silence
        self._mark = _Mark(time.monotonic(), "", silence.step_seconds)
        self._lost = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._logged: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        self._note("", self._silence.step_seconds)  # first: without memory the start of a thread can wait for ever
        try:
            self._thread.start()
        except RuntimeError as error:
            raise MemoryError(f"the lease's thread: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._silence.promise(math.inf)

    def check(self) -> None:
        """Return while it makes sense to go on. Called between steps of the work: each call is a mark of progress.

        Raises:
            Abandoned: the lease is lost or the process has been asked to end.
        """
        if self._lost.is_set():
            raise Abandoned("the lease is lost")
        if self._stop.is_set():
            raise Abandoned("the worker stops")
        self._note(self._mark.doing, self._mark.seconds)

    @contextmanager
    def long_call(self, doing: str) -> Iterator[None]:
        """Be more patient in the block: it is one call that cannot say how far it is. `doing` names it in words.

        Raises:
            Abandoned: see `check`.
        """
        self.check()
        self._note(doing, self._silence.long_call_seconds)
        try:
            yield
        finally:
            self._note("", self._silence.step_seconds)

    def on_progress(self, stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
        """`check` and log, in the shape that the training loops call after each step.

        It ends the patience of a `long_call` around the loop, which is for what the loop does before its first step.
        """
        self.check()
        self._note(f"{stage}, {step} of {steps}", self._silence.step_seconds)
        now = time.monotonic()
        if self._logged is None or self._logged[0] != stage or now - self._logged[1] >= PROGRESS_SECONDS:
            self._logged = (stage, now)
            rounded = {name: round(loss, 4) for name, loss in losses.items()}
            log.info("progress", stage=stage, step=step, steps=steps, **rounded)

    def _note(self, doing: str, seconds: float) -> None:
        self._mark = _Mark(time.monotonic(), doing, seconds)
        self._silence.promise(seconds)

    def _keep(self) -> None:
        renewed_at = time.monotonic()
        while not self._over.wait(self._seconds / RENEWALS_PER_LEASE):
            before, mark = time.monotonic(), self._mark
            if before - mark.at > mark.seconds:
                self._lost.set()
                doing = f" ({mark.doing})" if mark.doing else ""
                self._silence.on_stall(f"no progress for {before - mark.at:.0f} s{doing}, at most {mark.seconds:g} s")
                return
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
