"""Ctrl-C, SIGTERM and a closed terminal, as one exception that unwinds everything."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Somebody asked us to stop."""


class Interruption:
    """Raises `Interrupted` in the main thread at the first signal; later ones only set `impatient`."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.impatient = False
        self._armed = True

    def hold(self) -> None:
        """From now on a signal raises nothing: what runs is the clean-up."""
        self._armed = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            self.impatient = True
            return
        self.received = signal.Signals(number)
        if self._armed:
            self._armed = False
            raise Interrupted


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Handle the stop signals inside the block; put the former handlers back after it."""
    state = Interruption()
    former = {number: signal.signal(number, state._handle) for number in SIGNALS}
    try:
        yield state
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
