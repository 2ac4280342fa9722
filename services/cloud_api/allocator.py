"""How the C library gives memory to the threads of this process.

glibc gives threads arenas of their own, up to eight a core, and keeps what is freed in each for that arena's threads:
with 40 threads that read and write blocks of files, that was 20 MB that nobody used. Python's threads mostly take turns
anyway. The limit must be set before the threads are there.

Rejected: to let all large blocks be mapped and unmapped (`M_MMAP_THRESHOLD`), which costs an upload of 10 MiB 10 ms of
the kernel's time.
"""

import ctypes

ARENAS = 2
_M_ARENA_MAX = -8  # malloc.h


def share_arenas() -> None:
    """Let all threads share `ARENAS` arenas. Does nothing where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_ARENA_MAX, ARENAS)
