"""What a server's processes use together: processor seconds, those of ended children too, and resident memory.

A child that was waited for is in its parent's `cutime` and `cstime`. One that nobody of ours waited for is kept as it
was seen last, which is up to one sample too little. Linux only: it reads /proc.
"""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

SAMPLE_SECONDS = 0.1
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Seen:
    """One process at one moment.

    Attributes:
        parent: its parent's id.
        started: clock ticks from the machine's start; with the id it names a process for good.
        cpu_seconds: its own and those of its children that it has waited for.
        resident_bytes: memory that it holds.
    """

    parent: int
    started: int
    cpu_seconds: float
    resident_bytes: int


def look() -> dict[int, Seen]:
    """Return every process of the machine by its id."""
    processes = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                # The second field is the program's name in parentheses, which may hold anything.
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
                ticks = sum(int(each) for each in fields[11:15])
                processes[int(name)] = Seen(
                    int(fields[1]), int(fields[19]), ticks / _TICKS, int(fields[21]) * _PAGE_BYTES
                )
    return processes


@dataclass
class Tree:
    """Processes and all that descends from them, followed from one look at the machine to the next.

    Args:
        roots: ids of living processes.
    """

    roots: Iterable[int]
    _members: dict[int, Seen] = field(default_factory=dict)
    _left: float = 0.0

    def update(self, processes: Mapping[int, Seen]) -> tuple[float, int]:
        """Take in what was seen; return the processor seconds of all that ever belonged to it, and its memory now."""
        if not self._members:
            self._members = {pid: processes[pid] for pid in self.roots}
        living = {
            pid: processes[pid]
            for pid, seen in self._members.items()
            if pid in processes and processes[pid].started == seen.started
        }
        for pid, seen in self._members.items():
            if pid not in living and not self._has_living_ancestor(seen, living):
                self._left += seen.cpu_seconds
        grown = True
        while grown:
            new = {pid: seen for pid, seen in processes.items() if pid not in living and seen.parent in living}
            living |= new
            grown = bool(new)
        self._members = living
        cpu_seconds = self._left + sum(seen.cpu_seconds for seen in living.values())
        return cpu_seconds, sum(seen.resident_bytes for seen in living.values())

    def _has_living_ancestor(self, seen: Seen, living: Mapping[int, Seen]) -> bool:
        """Whether somebody has been told what an ended process had used."""
        while seen.parent in self._members:
            if seen.parent in living:
                return True
            seen = self._members[seen.parent]
        return False


class Usage:
    """Samples trees of processes from a thread. Use as a context manager.

    Args:
        trees: name -> ids of the processes whose trees are taken together.
    """

    def __init__(self, trees: Mapping[str, Iterable[int]]) -> None:
        self._trees = {name: Tree(list(roots)) for name, roots in trees.items()}
        self._samples: dict[str, list[tuple[float, float]]] = {name: [] for name in trees}
        self._most_bytes = dict.fromkeys(trees, 0)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="usage", daemon=True)

    def __enter__(self) -> Self:
        self.take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def cpu_seconds(self, name: str, start: float, end: float) -> float:
        """Processor seconds between two moments (`time.time`), of which both must have been sampled around."""
        samples = self._samples[name]
        return interpolated(samples, end) - interpolated(samples, start)

    def most_bytes(self, name: str) -> int:
        """The most memory that the processes of a tree have been seen to hold together."""
        return self._most_bytes[name]

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.take()

    def take(self) -> None:
        """Look now, so that everything up to this moment can be asked for."""
        with self._lock:
            processes, now = look(), time.time()
            for name, tree in self._trees.items():
                cpu_seconds, resident_bytes = tree.update(processes)
                self._samples[name].append((now, cpu_seconds))
                self._most_bytes[name] = max(self._most_bytes[name], resident_bytes)


def interpolated(samples: list[tuple[float, float]], at: float) -> float:
    """Return the value at a moment, on a straight line between the samples around it.

    Raises:
        ValueError: it lies outside of all samples.
    """
    for (before, low), (after, high) in itertools.pairwise(samples):
        if before <= at <= after:
            return low + (high - low) * (at - before) / (after - before)
    raise ValueError(f"expected a moment from {samples[0][0]} to {samples[-1][0]}, got {at}")
