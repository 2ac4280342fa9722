"""When to try again: exponential back-off with full jitter, `Retry-After` obeyed.

Full jitter (a uniform draw between zero and the exponential bound) spreads the devices best after an outage:
https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/. The wait and the randomness are given, so
that tests need neither time nor luck.
"""

from collections.abc import Callable
from typing import TypeVar

import structlog

from edge_agent.errors import CloudUnavailable, Stopped

Result = TypeVar("Result")

log = structlog.get_logger(__name__)


class Backoff:
    """Delays of one series of failures, in seconds."""

    def __init__(self, random: Callable[[], float], *, base_seconds: float = 0.5, cap_seconds: float = 60.0) -> None:
        """`random` returns uniform numbers in [0, 1)."""
        self._random = random
        self._base_seconds = base_seconds
        self._cap_seconds = cap_seconds
        self._failures = 0

    def next_delay(self, retry_after_seconds: float | None = None) -> float:
        """Count one more failure and return how long to wait.

        Uniform in [0, min(cap, base * 2^failures)]. With `retry_after_seconds` the draw is added to it: never sooner
        than the server asked for, and not all devices at that same moment.
        """
        # The exponent is bounded: 2.0**1024 overflows, after some eight hours of failures at half a minute each.
        bound = min(self._cap_seconds, self._base_seconds * 2.0 ** min(self._failures, 64))
        self._failures += 1
        return (retry_after_seconds or 0.0) + bound * self._random()

    def reset(self) -> None:
        """Forget the failures, after a success."""
        self._failures = 0


class Retrier:
    """Calls something until the cloud answers it."""

    def __init__(self, wait: Callable[[float], bool], new_backoff: Callable[[], Backoff]) -> None:
        """`wait(seconds)` returns True at once when the process shall stop (`threading.Event.wait`)."""
        self._wait = wait
        self._new_backoff = new_backoff

    def call(self, what: str, action: Callable[[], Result]) -> Result:
        """Return `action()`, called again after each `CloudUnavailable`, for as long as it takes.

        A call that moved some bytes forward starts the series of delays anew.

        Raises:
            Stopped: the process shall stop.
            CloudRefused: the server said no.
        """
        backoff = self._new_backoff()
        while True:
            try:
                return action()
            except CloudUnavailable as error:
                if error.progressed:
                    backoff.reset()
                delay_seconds = backoff.next_delay(error.retry_after_seconds)
                log.warning("cloud_unavailable", call=what, error=str(error), retry_in_seconds=round(delay_seconds, 1))
                if self._wait(delay_seconds):
                    raise Stopped from None
