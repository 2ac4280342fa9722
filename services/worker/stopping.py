"""Ends the process within a limit after SIGTERM or SIGINT, whatever its main thread is doing.

Python runs signal handlers in the main thread, between bytecodes: one long call into torch would delay them past any
limit. So both signals are blocked everywhere and a thread of its own waits for them.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

import structlog

STOP_SECONDS = 8.0
"""From the signal to the process's end at the latest; orchestrators commonly kill after 10."""

_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def block_signals() -> None:
    """Keep SIGTERM and SIGINT from every thread of this process. Call it in the main thread, before any other."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def watch_signals(stop: threading.Event, on_stop: Callable[[], None], seconds: float = STOP_SECONDS) -> None:
    """Start the thread that waits for the signals.

    On the first one it sets `stop` and calls `on_stop`; whoever works looks at `stop` and gives up. If the process has
    not ended `seconds` later, or on a second signal, it is ended at once. That is safe at any moment: an
    abandoned job keeps its lease until it runs out, then another worker takes it.
    """
    threading.Thread(target=_wait, args=(stop, on_stop, seconds), name="signals", daemon=True).start()


def end_process(code: int) -> NoReturn:
    """End the process now, without tearing the interpreter down.

    With torch and transformers imported the teardown collects garbage for seconds, on a busy machine for more than ten,
    and nothing can interrupt it. Nothing needs it either: whatever must survive was committed or is a whole file.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(stop: threading.Event, on_stop: Callable[[], None], seconds: float) -> None:
    log = structlog.get_logger("worker.stopping")
    received = signal.sigwait(_SIGNALS)
    log.info("stop_requested", signal=signal.Signals(received).name)
    stop.set()
    on_stop()
    signal.sigtimedwait(_SIGNALS, seconds)
    log.warning("stop_forced", seconds=seconds)
    end_process(0)
