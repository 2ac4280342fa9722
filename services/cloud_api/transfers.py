"""How much of a file is held at a time: the less, the more files come and go at once.

Blocks that are large cost fewer turns of the event loop and fewer hand-overs to threads; a thousand of them at a time
would cost memory. So all transfers of a process share one amount.
"""

from collections.abc import Iterator
from contextlib import contextmanager

TOGETHER_BYTES = 8 * 2**20
SMALLEST_BYTES = 32 * 1024
LARGEST_BYTES = 2**20


class Transfers:
    """The transfers of this process, of one event loop."""

    def __init__(self) -> None:
        self.running = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count a transfer while it runs."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @property
    def block_bytes(self) -> int:
        """How many bytes each transfer should hold at a time now."""
        return min(max(TOGETHER_BYTES // max(self.running, 1), SMALLEST_BYTES), LARGEST_BYTES)
