"""The service: whole rounds of 20 devices with 10 MiB down and 10 MiB up, against Flower's deployment mode.

Both run on this machine at the same time, and take turns: a turn is a run of some rounds here, one round there. Clients
echo at once. What is compared: from the round's opening (there: from the choice of the clients) to the mean of all
updates, committed; and, here only, to the publication of the next version. Start-up, the first round of each and the
distribution of models are left out. Processor time is of the servers' processes: API, worker and controller; SuperLink
and all that descends from it. The clients are not alike: ours are threads of two processes, Flower's are the processes
that it starts for each message; that is part of its wall time, and none of its server's processor time.

Then the same service, started anew, with 20 and with 200 devices: the peak memory of the API and of the worker.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from benchmarks.flower import Flower, installed, running_flower
from benchmarks.measuring import Goal, print_goals, print_table, write_results
from benchmarks.processes import Usage
from benchmarks.round_cloud import COLUMNS, ROWS, SERVER, TENSORS, Cloud, RoundTimes, running_cloud
from command_line.embedded import API, WORKER

FLOWER = "flower"
ROUNDS = 3
"""Of a run; a turn of ours."""

MIB = 2**20


def measure_rounds(folder: Path, devices: int, turns: int) -> dict[str, Any]:
    """Let both play in turns; the first of each does not count."""
    ours: list[list[RoundTimes]] = []
    with running_cloud(folder / "cotune", devices) as cloud, Peer(folder / "flower", devices, turns) as peer:
        trees = {SERVER: cloud.process_ids().values()} | peer.processes()
        with Usage(trees) as usage:
            for turn in range(turns):
                players = [lambda: ours.append(_play_ours(cloud, usage)), lambda: peer.play(usage)]
                for play in players if turn % 2 == 0 else reversed(players):
                    play()
        memory = {name: usage.most_bytes(name) / MIB for name in trees}
    return summary(ours, peer.rounds, devices) | {"memory_mib": memory, "flower_gave_up": peer.gave_up}


class Peer:
    """Flower, where it is installed, until a round of its does not end: ours go on without it.

    Attributes:
        rounds: a turn each.
        gave_up: what did not end; None if everything did.
    """

    def __init__(self, folder: Path, devices: int, turns: int) -> None:
        self.rounds: list[dict[str, float]] = []
        self.gave_up: str | None = None
        self._folder = folder
        self._devices = devices
        self._turns = turns
        self._running = ExitStack()
        self._flower: Flower | None = None

    def __enter__(self) -> Self:
        if installed():
            with self._as_long_as_it_answers():
                shape = {"tensors": TENSORS, "rows": ROWS, "columns": COLUMNS}
                running = running_flower(self._folder, self._devices, self._turns + 1, **shape)
                self._flower = self._running.enter_context(running)
                self._flower.play()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._running.close()

    def processes(self) -> dict[str, list[int]]:
        """The server's, by the name of what they are."""
        return {} if self._flower is None else {FLOWER: [self._flower.superlink_id()]}

    def play(self, usage: Usage) -> None:
        """Play a round, if it plays at all."""
        if self._flower is None:
            return
        with self._as_long_as_it_answers():
            played = self._flower.play()
            usage.take()
            if played.answers != self._devices:
                raise RuntimeError(f"expected {self._devices} answers in Flower's round, got {played.answers}")
            cpu_seconds = usage.cpu_seconds(FLOWER, played.started, played.ended)
            self.rounds.append({"seconds": played.seconds, "cpu_seconds": cpu_seconds})

    @contextmanager
    def _as_long_as_it_answers(self) -> Iterator[None]:
        """End its processes where it does not: they would take the machine's time from the rounds that are left."""
        try:
            yield
        except BaseException as error:
            self._running.close()
            if not isinstance(error, TimeoutError):
                raise
            self._flower, self.gave_up = None, str(error)
            print(f"no more of Flower: {error}", flush=True)


def _play_ours(cloud: Cloud, usage: Usage) -> list[RoundTimes]:
    played = cloud.play(ROUNDS)
    usage.take()
    return cloud.times(played, usage)


def summary(ours: list[list[RoundTimes]], theirs: list[dict[str, float]], devices: int) -> dict[str, Any]:
    """Return medians over the rounds, and ratios of the same turn.

    Args:
        ours: by turn and round.
        theirs: a round by turn, of the first turns; empty where there is no Flower.
        devices: in a round.
    """
    rounds = [each for turn in ours for each in turn]
    found: dict[str, Any] = {
        "devices": devices,
        "cotune": {
            "rounds": [asdict(each) for each in rounds],
            "aggregated_seconds": statistics.median(each.aggregated for each in rounds),
            "published_seconds": statistics.median(each.published for each in rounds),
            "cpu_seconds_a_client": statistics.median(each.cpu_seconds for each in rounds) / devices,
        },
    }
    if theirs:
        pairs = list(zip(ours, theirs, strict=False))
        found["flower"] = {
            "rounds": theirs,
            "seconds": statistics.median(each["seconds"] for each in theirs),
            "cpu_seconds_a_client": statistics.median(each["cpu_seconds"] for each in theirs) / devices,
        }
        found["times_faster"] = {
            "aggregated": [other["seconds"] / statistics.median(e.aggregated for e in turn) for turn, other in pairs],
            "published": [other["seconds"] / statistics.median(e.published for e in turn) for turn, other in pairs],
        }
    return found


def measure_memory(folder: Path, devices: int) -> dict[str, float]:
    """Return the peak memory, MiB, of each process of a service that has played one round with so many devices."""
    with running_cloud(folder, devices) as cloud:
        peaks = {name: peak / MIB for name, peak in cloud.peak_bytes().items()}
    shutil.rmtree(folder)
    return peaks


def show_rounds(measured: dict[str, Any]) -> list[Goal]:
    """Print the table of the rounds, and return what was aimed at."""
    ours, devices, memory = measured["cotune"], measured["devices"], measured["memory_mib"]
    rows: list[list[object]] = [
        ["Cotune, to the mean", ours["aggregated_seconds"], "", ""],
        ["Cotune, to the next version", ours["published_seconds"], ours["cpu_seconds_a_client"], memory[SERVER]],
    ]
    goals = [Goal("server's processor time a client and round", ours["cpu_seconds_a_client"], 0.1, False, "s")]
    if "flower" in measured:
        theirs = measured["flower"]
        rows.append(["Flower", theirs["seconds"], theirs["cpu_seconds_a_client"], memory[FLOWER]])
        faster = statistics.median(measured["times_faster"]["published"])
        goals.insert(0, Goal("a round, to the next version, against Flower's", faster, 15, True))
    else:
        why = measured.get("flower_gave_up") or "it is not installed (`make bench-service` does that)"
        print(f"Flower is not compared with: {why}")
    title = f"a round of {devices} devices, {TENSORS} tensors, {4 * TENSORS * ROWS * COLUMNS / MIB:.0f} MiB each way"
    print_table(title, ("", "seconds", "processor s a client", "server's memory, MiB"), rows)
    return goals


def show_memory(peaks: dict[int, dict[str, float]]) -> list[Goal]:
    """Print the table of peak memory by number of devices, and return what was aimed at."""
    few, many = min(peaks), max(peaks)
    rows = [(count, *peak.values()) for count, peak in peaks.items()]
    print_table("peak memory, MiB", ("devices", *peaks[few]), rows)
    return [
        Goal(f"{name}'s peak memory, {many} devices against {few}", peaks[many][name] / peaks[few][name], 1.1, False)
        for name in (API, WORKER)
    ]


def main() -> None:
    """Measure, print, and write `results/bench_rounds.json`: once the rounds are known, and again with the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=20, help="in the rounds against Flower")
    parser.add_argument("--turns", type=int, default=3, help="that count; a round of Flower's each")
    parser.add_argument("--memory", type=int, nargs="*", default=[20, 200], help="devices to compare peak memory at")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cotune-bench-"))
    results: dict[str, Any] = {"load_before": os.getloadavg()}
    try:
        results["rounds"] = measure_rounds(folder, options.devices, options.turns)
        results["load_after_rounds"] = os.getloadavg()
        goals = show_rounds(results["rounds"])
        write(results, goals)
        if options.memory:
            results["peak_mib"] = {count: measure_memory(folder / f"memory-{count}", count) for count in options.memory}
            goals += show_memory(results["peak_mib"])
            write(results, goals)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_goals("bench-service, rounds", goals)


def write(results: dict[str, Any], goals: list[Goal]) -> None:
    """Write what is known."""
    write_results("rounds", results | {"goals": [vars(goal) | {"met": goal.met} for goal in goals]})


if __name__ == "__main__":
    main()
