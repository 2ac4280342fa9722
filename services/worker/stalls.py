"""Keeps a worker that stands still from keeping its job: a hang in a native call, a thread that finds no memory.

A stage marks its progress (`leases.Lease.check`). Two watch the marks:

- the lease's thread: it renews no lease of a stage that is silent for too long, gives the job back with the reason
  and ends the process;
- the watchdog, a process of its own, for when that thread cannot do so either: it kills the worker some time later.
  Then the lease runs out by itself.

Whoever started the worker (`cotune up`, the container's restart policy) starts it again, and meanwhile another worker
takes the job. Rejected: only a thread (it needs the interpreter's lock and memory), `faulthandler`'s own thread (each
mark would have to start a new one, which needs memory), and the supervisor (there is none in a container).
"""

import math
import os
import subprocess
import sys
import time
import traceback
from threading import main_thread

from worker import watchdog

SPEAK_SECONDS = 1.0
"""Marks that come faster than this are not all passed on to the watchdog."""


class Guard:
    """Has the watchdog kill this process if it is silent for too long.

    Args:
        grace_seconds: added to each silence, for the lease's thread to end the process in an orderly way first.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace = grace_seconds
        self._said = (math.inf, 0.0)
        self._start()

    def expect(self, seconds: float) -> None:
        """Promise the next call within so many seconds; infinity promises nothing."""
        now = time.monotonic()
        if seconds == self._said[0] and now - self._said[1] < SPEAK_SECONDS:
            return
        message = watchdog.MESSAGE.pack(seconds + self._grace)
        try:
            os.write(self._pipe, message)
        except BlockingIOError:  # it is suspended: what it has not read is newer than what it has
            return
        except BrokenPipeError:  # somebody killed it
            os.close(self._pipe)
            self._start()
            os.write(self._pipe, message)
        self._said = (seconds, now)

    @property
    def process_id(self) -> int:
        """The watchdog's."""
        return self._process.pid

    def close(self) -> None:
        """End the watchdog."""
        os.close(self._pipe)
        self._process.wait()

    def _start(self) -> None:
        reading, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        try:
            self._process = subprocess.Popen([sys.executable, "-I", "-S", watchdog.__file__], stdin=reading)
        finally:
            os.close(reading)


def where_it_stands() -> str:
    """Return the main thread's stack: files, lines and functions, no values."""
    return "".join(traceback.format_stack(sys._current_frames()[main_thread().ident or 0]))
