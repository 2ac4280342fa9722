"""Runs of an experiment in processes of their own, side by side: one a core, each with the experiment's threads.

Each process loads its own models and writes its own results; what it is told is a run, what it tells is how far it is.
A run that fails, or whose process is lost, is named at the end, when all that can be played is played and kept. When
the parent ends, however it does, they end too.
"""

import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from simulation.base_models import BaseModels, hush_transformers
from simulation.errors import RoundFailed, SimulationError
from simulation.planned import PlannedRun
from simulation.player import Listener, Player
from simulation.setup import Experiment

PROGRESS_SECONDS = 0.2
STOP_SECONDS = 5.0

Message = tuple[str, str, int, int]
"""`progress` with what and how many of how many, `done`, or `failed` with why."""


def play_apart(runs: Sequence[PlannedRun], player: Player, *, processes: int) -> None:
    """Play the runs that have no result yet, several at a time.

    Args:
        runs: of one experiment.
        player: whose experiment and folder; its listener is told of all of them. Its models are not used.
        processes: at a time, at most.

    Raises:
        RoundFailed: some could not be played; names each. All others were.
        CacheError: a kept result cannot be used.
    """
    missing = []
    for run in runs:
        if run.read() is None:
            missing.append(run)
        else:
            player.listener.on_run(run.key, True)
    if not missing:
        return
    # By strategy: two seeds of one never wait for the same proxy, as two strategies with one seed would.
    labels = list(dict.fromkeys(run.key.strategy for run in missing))
    waiting = deque(sorted(missing, key=lambda run: (labels.index(run.key.strategy), run.key.seed)))
    failed: list[str] = []
    with ExitStack() as stack:
        workers = _start(min(processes, len(waiting)), player, stack)
        for worker in workers:
            _next(worker, waiting, player.listener)
        while busy := {worker.connection: worker for worker in workers if worker.run is not None}:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker = busy[connection]
                problem = _hear(worker, player.listener)
                if problem is not None:
                    failed.append(problem)
                if worker.ended and waiting:
                    worker = _start(1, player, stack)[0]
                    workers.append(worker)
                if worker.run is None and not worker.ended:
                    _next(worker, waiting, player.listener)
    if failed:
        raise RoundFailed("; ".join(failed))


@dataclass
class _Worker:
    """A process, the parent's end of its pipe, and what it plays."""

    process: SpawnProcess
    connection: "Connection[PlannedRun | None, Message]"
    run: PlannedRun | None = None
    ended: bool = False


def _start(count: int, player: Player, stack: ExitStack) -> list[_Worker]:
    """Start processes that the stack ends."""
    context, workers = multiprocessing.get_context("spawn"), []
    _ensure_tracker()  # else the first process starts it, and that unblocks the signal
    for _ in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, player.experiment, player.proxies), daemon=True)
        # Children keep this mask: a Ctrl-C at the terminal is for us, who then end them.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
        theirs.close()
        workers.append(_Worker(process, ours))
        stack.callback(_end, workers[-1])
    return workers


def _ensure_tracker() -> None:
    """Have the standard library's resource tracker run, also where there was one and something else ended it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "resource_tracker:")  # Nothing of ours was in its care.
        resource_tracker.ensure_running()


def _next(worker: _Worker, waiting: "deque[PlannedRun]", listener: Listener) -> None:
    """Give a process something to do, or tell it that nothing is left."""
    worker.run = waiting.popleft() if waiting else None
    if worker.run is not None:
        listener.on_run(worker.run.key, False)
    with suppress(BrokenPipeError):  # It has ended; `_hear` says of which run.
        worker.connection.send(worker.run)


def _hear(worker: _Worker, listener: Listener) -> str | None:
    """Take one message; returns what went wrong with the run, if it is over and something did."""
    assert worker.run is not None
    key = worker.run.key
    try:
        kind, told, done, total = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        worker.run, worker.ended = None, True
        return f"{key}: its process ended {_how(worker.process.exitcode)}; other runs were played on"
    if kind == "progress":
        listener.on_progress(f"{key}: {told}", done, total)
        return None
    worker.run = None
    if kind == "failed":
        return told
    listener.on_end(key)
    return None


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"by signal {-code}" + (", as one that has no memory left" if -code == signal.SIGKILL else "")
    return f"with code {code}"


def _end(worker: _Worker) -> None:
    """End a process: one that plays loses an unfinished run; one that was told that nothing is left ends by itself."""
    worker.connection.close()
    if worker.run is None:
        worker.process.join(STOP_SECONDS)
    worker.process.terminate()
    worker.process.join(STOP_SECONDS)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _work(connection: "Connection[Message, PlannedRun | None]", experiment: Experiment, proxies: Path) -> None:
    """The life of a process: play what comes until nothing does."""
    threads = experiment.settings.threads
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false" if threads == 1 else "true"}
    torch.set_num_threads(threads)
    hush_transformers()
    listener = Listener(on_progress=_Progress(connection))
    player = Player(experiment, BaseModels(experiment.settings.llm_loading), proxies, listener)
    # Nobody reads any more where the parent is gone.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (run := connection.recv()) is not None:
            try:
                run.cache.write(player.result(run.key, run.entry))
            except SimulationError as error:
                told = str(error)
                connection.send(("failed", told if told.startswith(str(run.key)) else f"{run.key}: {told}", 0, 0))
            else:
                connection.send(("done", "", 0, 0))


@dataclass
class _Progress:
    """Tells the parent a few times a second, and the end of each part."""

    connection: "Connection[Message, PlannedRun | None]"
    _told: float = field(default=0.0)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS or done >= total:
            self._told = now
            self.connection.send(("progress", what, done, total))
