"""What a machine does to a process short of ending it: stand still, no memory, no disk."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUSPENDED_SECONDS = 3.0
"""Longer than the lease, which another worker therefore takes."""

DENIED_SECONDS = 1.0
FULL_SECONDS = 1.5
DISK_BYTES = 48 * 2**20


def suspend(pid: int) -> None:
    """Stop a process for a while, as a machine that swaps does."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(SUSPENDED_SECONDS)
    os.kill(pid, signal.SIGCONT)


def deny_memory(pid: int) -> None:
    """Let a process have no more address space than it has, for a while."""
    statm = Path(f"/proc/{pid}/statm").read_text(encoding="ascii")
    now = int(statm.split()[0]) * resource.getpagesize()
    before = resource.prlimit(pid, resource.RLIMIT_AS, (now, resource.RLIM_INFINITY))
    time.sleep(DENIED_SECONDS)
    resource.prlimit(pid, resource.RLIMIT_AS, before)


def fill(folder: Path) -> None:
    """Take every free byte of a small disk, for a while."""
    filler = folder / f"filler-{uuid.uuid4()}"  # the disk may be full of another one
    with filler.open("wb", buffering=0) as file:
        for size in (2**16, 2**9, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
        time.sleep(FULL_SECONDS)
    filler.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a small file system in memory; None where this user may not."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        for _ in range(50):
            if subprocess.run(["umount", folder], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        else:
            raise OSError(errno.EBUSY, "the small disk cannot be unmounted", str(folder))
