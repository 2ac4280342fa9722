"""Starts processes in milliseconds: a process that has imported what they need forks them.

A worker spends its first seconds importing torch; killed two hundred times it would do nothing else. So one process
imports, never starts a thread, and forks on demand; the child calls the same `main` that `python -m worker` calls.
What is forked ends with the zygote (the kernel sees to it), and the zygote ends when its standard input does.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, NoReturn, Self

CLOCK_SKEW = "CHAOS_CLOCK_SKEW_SECONDS"
"""Environment variable: how far the process's clock is ahead of the machine's."""

CHUNK_BYTES = "CHAOS_CHUNK_BYTES"
"""Environment variable: size of the chunks in which files may come; the service itself takes none under 4 MiB."""

LIGHT = ("celery", "cloud_api.app", "cloud_api.server", "worker.processes", "benchmarks.chaos.device")
HEAVY = (
    *("celery", "torch", "transformers", "peft", "worker.processes", "worker.preparation", "worker.aggregation"),
    *("worker.co_tuning", "worker.evaluation", "benchmarks.chaos.files"),
)
CLOCKS = ("cloud_api.cloud", "worker.stage", "benchmarks.chaos.device")
"""Modules whose `datetime` is the clock of a process."""

START_SECONDS = 120.0
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Zygote:
    """A process that forks others. Use as a context manager.

    Args:
        modules: imported before anything is forked.
        log: file for what goes wrong in the zygote itself.
    """

    def __init__(self, modules: Sequence[str], log: Path) -> None:
        self._modules = modules
        self._log = log
        self._lock = threading.Lock()
        self._started: list[int] = []
        self._ended: dict[int, int] = {}
        self._news = threading.Condition()

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.chaos.zygote", *self._modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, no Python lock
            )
        self._reader = threading.Thread(target=self._read, name="zygote", daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def start(self, call: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        """Fork a process that calls `module:function` with `arguments`; return its id."""
        order = {"call": call, "arguments": list(arguments), "environment": dict(environment), "log": str(log)}
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            with self._news:
                if not self._news.wait_for(lambda: self._started, START_SECONDS):
                    raise TimeoutError(f"no process within {START_SECONDS:.0f} s; {self._log}")
                return self._started.pop()

    def status(self, pid: int) -> int | None:
        """Return how a process ended (negative: by that signal), None while it lives."""
        with self._news:
            return self._ended.get(pid)

    def wait(self, pid: int, seconds: float) -> int:
        """Wait for a process's end."""
        with self._news:
            if not self._news.wait_for(lambda: pid in self._ended, seconds):
                raise TimeoutError(f"process {pid} did not end within {seconds:.0f} s")
            return self._ended[pid]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            news = json.loads(line)
            with self._news:
                if "started" in news:
                    self._started.append(news["started"])
                else:
                    self._ended[news["ended"]] = news["status"]
                self._news.notify_all()


def main() -> None:
    """Import, then fork whatever standard input asks for, until it ends."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()
    waiting = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.01)
        if readable:
            block = os.read(0, 65536)
            if not block:
                return
            *lines, waiting = (waiting + block).split(b"\n")
            for line in lines:
                _say({"started": _fork(json.loads(line))})
        while (ended := _ended_child()) is not None:
            _say(ended)


def _fork(order: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        _leave(_outcome(order))
    return child


def _outcome(order: dict[str, Any]) -> int:
    try:
        return _run(order)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _run(order: dict[str, Any]) -> int:
    os.setsid()
    die_with_parent()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(order["environment"])
    if skew := float(os.environ.get(CLOCK_SKEW, "0")):
        _set_clocks(timedelta(seconds=skew))
    if (size := os.environ.get(CHUNK_BYTES)) and (settings := sys.modules.get("cloud_api.settings")):
        vars(settings)["SMALLEST_CHUNK"] = int(size)
    module, _, function = order["call"].partition(":")
    return int(getattr(importlib.import_module(module), function)(order["arguments"]) or 0)


def _set_clocks(skew: timedelta) -> None:
    class SkewedDatetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + skew

    for name in CLOCKS:
        if name in sys.modules:
            vars(sys.modules[name])["datetime"] = SkewedDatetime


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ended_child() -> dict[str, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return {"ended": pid, "status": os.waitstatus_to_exitcode(status)} if pid else None


def _say(news: dict[str, int]) -> None:
    sys.stdout.write(json.dumps(news) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
