"""A lock between processes of one machine, on a file of its own."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system takes back when this process ends, however it ends; who comes second waits.

    Args:
        path: of the lock's own file, in a folder that is there. It stays: who removed it would let two in.
    """
    with open(path, "a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
