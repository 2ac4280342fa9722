"""Tells the server how training goes, from a thread of its own: it never blocks training and never fails it.

Only the newest report counts, at most one a second goes out, and one that cannot be delivered is dropped. The answers
matter, though: when the server says that the round is closed or the assignment gone, training is cancelled.
"""

import math
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

import structlog

from edge_agent.backoff import Backoff
from edge_agent.client import CloudClient
from edge_agent.errors import Cancelled, CloudError, CloudRefused, CloudUnavailable, NotAuthorised, Stopped
from protocol.assignments import Assignment, AssignmentProgress
from protocol.devices import Heartbeat
from protocol.statuses import AssignmentStatus

MOST_LOSSES = 16
LONGEST_STAGE = 64
FIRST_HEARTBEAT_SECONDS = 10.0
GONE = frozenset({404, 409, 410})
"""Answers to a progress report that mean: nobody waits for this any more."""

log = structlog.get_logger(__name__)


class TrainingReporter:
    """A context manager around the training of one assignment."""

    def __init__(
        self,
        client: CloudClient,
        assignment: Assignment,
        stop: threading.Event,
        *,
        backoff: Backoff,
        clock: Callable[[], float],
        interval_seconds: float = 1.0,
    ) -> None:
        """`clock` is monotonic, in seconds."""
        self._client = client
        self._assignment = assignment
        self._stop = stop
        self._backoff = backoff
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._newest: AssignmentProgress | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._verdict: Exception | None = None
        self._thread = threading.Thread(target=self._send_all, name="progress", daemon=True)

    def __enter__(self) -> "TrainingReporter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed.set()
        # A report may be stuck in a time-out; it is abandoned, as whatever it would learn comes too late.
        self._thread.join(timeout=0.2)

    def on_progress(self, stage: str, step: int, steps: int, losses: Mapping[str, float]) -> None:
        """Take note of a step; called by the training loop.

        Raises:
            Stopped: the process shall stop.
            Cancelled: the server no longer wants this assignment.
            NotAuthorised: the server no longer accepts this device.
        """
        self.check()
        finite = {name: float(value) for name, value in losses.items() if math.isfinite(value)}
        progress = AssignmentProgress(
            status=AssignmentStatus.TRAINING,
            stage=stage[:LONGEST_STAGE],
            step=step,
            steps=steps,
            losses=dict(sorted(finite.items())[:MOST_LOSSES]),
        )
        with self._lock:
            self._newest = progress

    def check(self) -> None:
        """Raise as `on_progress` does if there is no point in going on."""
        if self._stop.is_set():
            raise Stopped
        if self._verdict is not None:
            raise self._verdict

    def _send_all(self) -> None:
        heartbeat_at = self._clock() + FIRST_HEARTBEAT_SECONDS
        pause_seconds = self._interval_seconds
        while not self._closed.wait(pause_seconds) and not self._stop.is_set():
            pause_seconds = self._interval_seconds
            try:
                self._send_newest()
                if self._clock() >= heartbeat_at:
                    receipt = self._client.heartbeat(Heartbeat(activity="training"))
                    heartbeat_at = self._clock() + max(receipt.next_within_seconds / 2, self._interval_seconds)
                self._backoff.reset()
            except CloudUnavailable as error:
                pause_seconds += self._backoff.next_delay(error.retry_after_seconds)
            except (Stopped, CloudError) as error:
                self._judge(error)

    def _send_newest(self) -> None:
        with self._lock:
            newest, self._newest = self._newest, None
        if newest is not None:
            self._client.report_progress(self._assignment, newest)

    def _judge(self, error: Stopped | CloudError) -> None:
        if self._closed.is_set() or isinstance(error, Stopped):
            return
        if isinstance(error, NotAuthorised):
            self._verdict = error
        elif isinstance(error, CloudRefused) and error.status in GONE:
            self._verdict = Cancelled(str(error))
        else:
            log.warning("report_refused", error=str(error))
