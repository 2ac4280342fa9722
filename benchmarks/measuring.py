"""What the benchmarks share: interleaved timing, a child process's peak memory, a table of targets, and the JSON file.

Timings of one machine mean little on another, and on a shared machine little a minute later. So candidates take turns,
every ratio is of two times of the same turn, and the median over the turns is reported with its quartiles.
"""

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from assets.process_memory import forget_peak, peak_memory

RESULTS = Path(__file__).parent.parent / "results"
_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "numpy", "trl")


@dataclass(frozen=True)
class Timing:
    """One candidate's times, and its ratios to the baseline of the same turn. Quartiles are (25 %, 75 %)."""

    seconds: float
    speed_ratio: float
    speed_quartiles: tuple[float, float]

    @property
    def time_ratio(self) -> float:
        """Its time divided by the baseline's; `speed_ratio` is the other way round."""
        return 1 / self.speed_ratio


def compare(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each candidate `repeats` times, in turns whose order alternates; the first candidate is the baseline.

    Args:
        candidates: name -> what to time; called without arguments.
        repeats: turns that count, at least 2.
        warm_up: turns before that do not count.
        clock: seconds from some start. `time.process_time`, where candidates use one thread, leaves out what other
            processes took.

    Returns:
        By name: median seconds, and the median over the turns of (baseline's time / candidate's time).
    """
    if repeats < 2 or not candidates:
        raise ValueError(f"expected candidates and at least 2 repeats, got {len(candidates)} and {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm_up + repeats):
        order = list(candidates.items())
        for name, call in order if turn % 2 == 0 else reversed(order):
            start = clock()
            call()
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    baseline = seconds[next(iter(candidates))]
    timings = {}
    for name, taken in seconds.items():
        ratios = [base / own for base, own in zip(baseline, taken, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        timings[name] = Timing(statistics.median(taken), middle, (low, high))
    return timings


@dataclass(frozen=True)
class PeakMemory:
    """Resident bytes of a child process before a function ran, and the most while it ran."""

    before_bytes: int
    peak_bytes: int

    @property
    def extra_bytes(self) -> int:
        """What the function itself needed."""
        return self.peak_bytes - self.before_bytes


def peak_memory_of(function: str, **arguments: Any) -> PeakMemory:
    """Run a function in a fresh Python process and measure its resident memory.

    What the process holds is measured, and not how glibc's heap is cut up: large blocks are given back when freed. With
    glibc's own moving threshold a long stream ends some MiB higher, and stays there.

    Args:
        function: `package.module:name`; what it does outside the call (imports) counts as before.
        arguments: passed as JSON.
    """
    paths = os.pathsep.join([str(RESULTS.parent), *filter(None, sys.path)])
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.measuring", function, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": paths, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    return PeakMemory(**json.loads(output.splitlines()[-1]))


def _measure_here(function: str, arguments: Mapping[str, Any]) -> PeakMemory:
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    forget_peak()
    before = peak_memory()
    call(**arguments)
    return PeakMemory(before, peak_memory())


@dataclass(frozen=True)
class Goal:
    """A measured value and the limit set for it."""

    measure: str
    value: float
    limit: float
    at_least: bool
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers are cut to four significant digits."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(table)


def print_goals(title: str, goals: Sequence[Goal]) -> None:
    """Print what was measured beside what was aimed at."""
    rows = [
        (
            goal.measure,
            f"{goal.value:.4g} {goal.unit}",
            f"{'at least' if goal.at_least else 'at most'} {goal.limit:g} {goal.unit}",
            "yes" if goal.met else "NO",
        )
        for goal in goals
    ]
    print_table(title, ("measure", "measured", "target", "met"), rows)


def facts() -> dict[str, Any]:
    """The machine and the versions under which figures were taken."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Write `results/bench_<name>.json`: the results and the `facts` under which they were taken."""
    path = RESULTS / f"bench_{name}.json"
    path.write_text(json.dumps({"facts": facts(), **results}, indent=2) + "\n")
    print(f"written: results/{path.name}")
    return path


if __name__ == "__main__":
    measured = _measure_here(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps({"before_bytes": measured.before_bytes, "peak_bytes": measured.peak_bytes}))
