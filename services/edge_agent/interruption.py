"""Ends the wait for a call when the process shall stop.

A blocked socket cannot be woken from another thread, and a signal handler that raises could hit any line. So the call
runs in a daemon thread, and a stop abandons it: it holds nothing that matters, and its own time-outs end it.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

from edge_agent.errors import Stopped

Result = TypeVar("Result")

LOOK_SECONDS = 0.1
"""How often the stop event is looked at while a call is under way."""


def call_until_stopped(action: Callable[[], Result], stop: threading.Event) -> Result:
    """Return `action()` or raise what it raises.

    Raises:
        Stopped: `stop` was set first.
    """
    if stop.is_set():
        raise Stopped
    results: list[Result] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:  # carried over to the caller's thread
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="cloud-call", daemon=True).start()
    while not done.wait(LOOK_SECONDS):
        if stop.is_set():
            raise Stopped
    if errors:
        raise errors[0]
    return results[0]
