"""An answer that is good for a moment: what anybody may ask, without a credential, costs no more however many ask."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Recent(Generic[Answer]):
    """The last answer to one question. Who asks while it is being found out waits for that.

    Args:
        seconds: so long it is good.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._known: tuple[float, Answer] | None = None
        """When it stops being good, and the answer."""
        self._lock = asyncio.Lock()

    async def get(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """Return the last answer if it is good, else ask."""
        async with self._lock:
            if self._known is None or time.monotonic() >= self._known[0]:
                answer = await ask()
                self._known = time.monotonic() + self._seconds, answer
            return self._known[1]
