"""Ends what a supervisor left behind.

A supervisor marks everything it starts with an environment variable, which children's children inherit whatever
session they move to. The guardian is one small process that holds the reading end of a pipe from the supervisor. When
the supervisor is gone, be it by `kill -9`, the pipe closes and the guardian ends every process that carries the mark.

Standard library only, and run by file name without `site`, so that it costs a few milliseconds. Rejected:
PR_SET_PDEATHSIG, which reaches children but not their children, and a list of process ids, which has a gap between
the start of a process and the note of it. Linux only: it reads /proc.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

MARK = "COTUNE_SUPERVISOR"
"""Environment variable that every process of one supervisor carries, with that supervisor's own value."""

GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL when the supervisor itself is gone."""


YOUNG_SECONDS = 5.0
"""A process in the middle of its `exec` shows no environment for a moment, on a busy machine for longer."""


SCANS_WITHOUT_ONE = 2
"""A dying process may start another behind the back of one scan; that one is there in the next."""


def marked_processes(mark: str) -> list[int]:
    """Return the ids of the living processes that carry `mark`, but not our own."""
    return _scan(mark)[0]


def end_marked(mark: str, grace_seconds: float) -> list[int]:
    """End every process that carries `mark`: SIGTERM, after `grace_seconds` SIGKILL. Return the ids of the killed."""
    deadline = time.monotonic() + grace_seconds
    asked: set[int] = set()
    killed: set[int] = set()
    unseen = 0
    while unseen < SCANS_WITHOUT_ONE:
        marked, undecided = _scan(mark)
        unseen = 0 if marked or undecided else unseen + 1
        late = time.monotonic() >= deadline
        for process in marked:
            if late or process not in asked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL if late else signal.SIGTERM)
            asked.add(process)
            if late:
                killed.add(process)
        time.sleep(0.05)
    return sorted(killed)


def _scan(mark: str) -> tuple[list[int], bool]:
    """Return the processes that carry `mark`, and whether there is a young one that does not show what it carries."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    undecided = False
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        # One that ended meanwhile, or somebody else's, cannot be read.
        with contextlib.suppress(OSError):
            environment = Path(entry.path, "environ").read_bytes()
            if wanted in environment.split(b"\0"):
                found.append(int(entry.name))
            elif not environment and _is_young_program(entry.path):
                undecided = True
    return found, undecided


def _is_young_program(process: str) -> bool:
    """Whether a process runs a program, as zombies and the kernel's threads do not, and has only just started."""
    os.readlink(f"{process}/exe")
    started = int(Path(process, "stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started < YOUNG_SECONDS


def main() -> None:
    """Wait until standard input closes, then end the processes that carry the mark given as the only argument."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    end_marked(sys.argv[1], GRACE_SECONDS)


if __name__ == "__main__":
    main()
