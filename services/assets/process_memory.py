"""The most memory that this process has had, and forgetting it, so that stages can be told apart."""

import resource
import sys
from pathlib import Path

PROCESS = Path("/proc/self")


def peak_memory(process: Path = PROCESS) -> int:
    """The largest resident size of this process, in bytes, since it started or since `forget_peak`.

    `VmHWM` of Linux where it is told, as not every sandbox does, and not `getrusage`: the latter's maximum is inherited
    through fork and exec, so a child would report its parent's.

    Args:
        process: the process's folder in `/proc`.
    """
    if sys.platform == "linux":
        _, _, told = (process / "status").read_text().partition("VmHWM:")
        if told:
            return int(told.split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak(process: Path = PROCESS) -> bool:
    """Let the peak start anew from what is resident now. False where the system does not let it."""
    if sys.platform != "linux":
        return False
    try:
        (process / "clear_refs").write_text("5")
    except OSError:
        return False
    return True
