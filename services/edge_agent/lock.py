"""One agent a home folder: an advisory lock that the kernel drops when its holder dies."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_agent.errors import AlreadyRunning


@contextmanager
def hold(home: Path) -> Iterator[None]:
    """Hold the home folder for the body of the `with`.

    Raises:
        AlreadyRunning: another process holds it; the message names its process id.
    """
    descriptor = os.open(home / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _lock(descriptor):
            process = os.pread(descriptor, 32, 0).decode().strip()
            raise AlreadyRunning(f"another agent uses {home} (process {process or 'unknown'})")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    for _ in range(5):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)  # `holder` below may be looking at this very moment; it lets go at once
        else:
            return True
    return False


def holder(home: Path) -> int | None:
    """Return the process id that holds the home folder, or None. Does not take the lock for longer than a look."""
    try:
        descriptor = os.open(home / "agent.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).decode().strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(descriptor)
    return None
