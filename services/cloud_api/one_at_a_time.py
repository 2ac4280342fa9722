"""Work of which one at a time is enough: who asks for it again meanwhile waits, and then finds it done."""

import asyncio
from weakref import WeakValueDictionary


class OneAtATime:
    """A lock for each name, for as long as somebody holds it or waits for it. Of this process only."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def of(self, name: str) -> asyncio.Lock:
        """Return the lock of `name`."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock
