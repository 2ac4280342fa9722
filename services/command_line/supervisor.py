"""Starts processes, restarts those that die, and ends them all in stages.

Nothing runs in the background here: the owner calls `check()` a few times a second, and everything that happens,
happens in that call. Each process is the leader of its own session, so Ctrl-C at the terminal reaches only the owner;
its standard output and error go to a log file. What even the owner's death cannot leave behind: `guardian`.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from command_line import guardian
from command_line.errors import BadInput, ProcessFailed

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class ProcessSpec:
    """One process to keep alive."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to what the supervisor's processes inherit."""
    stop_stage: int = 0
    """Processes of a lower stage are ended, and have ended, before those of the next are asked to."""
    hopeless_exit_code: int | None = None
    """A first start that ends with it would do so again. Later it is as any other: then it has worked before."""


@dataclass(frozen=True)
class RestartPolicy:
    """How often a process may die before we give up: so many times within so many seconds."""

    max_restarts: int = 5
    within_seconds: float = 120.0
    first_delay_seconds: float = 0.25
    """Doubles with each restart within the window."""


@dataclass
class _Supervised:
    spec: ProcessSpec
    log: Path
    process: subprocess.Popen[bytes]
    deaths: list[float] = field(default_factory=list)
    restart_at: float | None = None
    restarted: bool = False
    peak_memory_bytes: int = 0
    former_cpu_seconds: float = 0.0
    """Of the processes that this one is the restart of."""
    cpu_seconds: float = 0.0


class Supervisor:
    """Keeps a set of processes alive. Use as a context manager: leaving it ends them all.

    Args:
        logs: Folder for the log files, one a process, appended to.
        notify: Called with one line for a person whenever a process died, came back or had to be killed.
        environment: What processes inherit; default: our own environment.
        hurry: Asked while processes are being ended; True skips what is left of the grace (a second Ctrl-C).
    """

    def __init__(
        self,
        logs: Path,
        *,
        notify: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        policy: RestartPolicy = RestartPolicy(),
        stop_seconds: float = 10.0,
        hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        self.logs = logs
        self.mark = secrets.token_hex(8)
        self._notify = notify
        self._environment = dict(os.environ if environment is None else environment)
        self._policy = policy
        self._stop_seconds = stop_seconds
        self._hurry = hurry
        self._supervised: dict[str, _Supervised] = {}
        self._guardian: subprocess.Popen[bytes] | None = None
        self._outer_mark: str | None = None

    def __enter__(self) -> Self:
        self._start_guardian()
        # So that what is started by other means, and not kept alive, does not outlive us either.
        self._outer_mark = os.environ.get(guardian.MARK)
        os.environ[guardian.MARK] = self.mark
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, spec: ProcessSpec) -> None:
        """Start a process. It is restarted when it dies, unless that is hopeless (`ProcessSpec.hopeless_exit_code`).

        Raises:
            ProcessFailed: its program cannot be executed.
        """
        assert spec.name not in self._supervised, f"{spec.name} is already started"
        log = self.logs / f"{spec.name}.log"
        self._supervised[spec.name] = _Supervised(spec, log, self._spawn(spec, log))

    def run(self, spec: ProcessSpec) -> subprocess.Popen[bytes]:
        """Start a process that is expected to end by itself; the caller waits for it. `stop()` ends it too."""
        return self._spawn(spec, self.logs / f"{spec.name}.log")

    def check(self) -> None:
        """Restart what died and whose time has come; note memory.

        Raises:
            ProcessFailed: a process died more often than the policy allows; holds the end of its log.
            BadInput: a process said at its first start that it is of no use to start it again; holds what it said.
        """
        now = time.monotonic()
        if self._guardian is None or self._guardian.poll() is not None:
            self._dismiss_guardian()
            self._start_guardian()
        for each in self._supervised.values():
            if each.restart_at is not None:
                if now >= each.restart_at:
                    each.process = self._spawn(each.spec, each.log)
                    each.restart_at = None
                    each.restarted = True
                    self._notify(f"{each.spec.name} is started again (process {each.process.pid})")
            elif each.process.poll() is not None:
                self._bury(each, now)
            else:
                each.peak_memory_bytes = max(each.peak_memory_bytes, peak_memory_bytes(each.process.pid))
                each.cpu_seconds = max(each.cpu_seconds, cpu_seconds(each.process.pid))

    def keep_alive(self, done: Callable[[], bool], *, every_seconds: float = 0.5) -> None:
        """Call `check()` every `every_seconds` until `done()`."""
        while not done():
            self.check()
            time.sleep(every_seconds)

    def process_ids(self) -> dict[str, int]:
        """The ids of the supervised processes that live now, by name."""
        return {name: each.process.pid for name, each in self._supervised.items() if each.process.poll() is None}

    def peak_memory(self) -> dict[str, int]:
        """The largest resident memory of each supervised process so far, bytes, by name."""
        return {name: each.peak_memory_bytes for name, each in self._supervised.items()}

    def cpu_seconds(self) -> dict[str, float]:
        """The processor seconds of each supervised process and of those it replaced so far, by name."""
        return {name: each.former_cpu_seconds + each.cpu_seconds for name, each in self._supervised.items()}

    def stop(self) -> None:
        """End every process: stage by stage SIGTERM, after `stop_seconds` SIGKILL; at the end whatever is left."""
        for stage in sorted({each.spec.stop_stage for each in self._supervised.values()}):
            self._stop_stage([each for each in self._supervised.values() if each.spec.stop_stage == stage])
        self._supervised.clear()
        killed = guardian.end_marked(self.mark, 0.0 if self._hurry() else 2.0)
        if killed:
            self._notify(f"killed {len(killed)} processes that did not end in time")
        self._dismiss_guardian()
        os.environ.pop(guardian.MARK, None)
        if self._outer_mark is not None:
            os.environ[guardian.MARK] = self._outer_mark

    def _stop_stage(self, members: list[_Supervised]) -> None:
        living = [each for each in members if each.process.poll() is None]
        for each in living:
            _signal_group(each.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self._stop_seconds
        while living and time.monotonic() < deadline and not self._hurry():
            time.sleep(POLL_SECONDS)
            living = [each for each in living if each.process.poll() is None]
        for each in living:
            _signal_group(each.process.pid, signal.SIGKILL)
            each.process.wait()
            self._notify(f"{each.spec.name} did not end within {self._stop_seconds:.0f} s and was killed")

    def _bury(self, each: _Supervised, now: float) -> None:
        _signal_group(each.process.pid, signal.SIGKILL)  # what it had started and left
        each.deaths = [at for at in each.deaths if now - at < self._policy.within_seconds] + [now]
        each.former_cpu_seconds += each.cpu_seconds
        each.cpu_seconds = 0.0
        if each.process.returncode == each.spec.hopeless_exit_code and not each.restarted:
            raise BadInput(
                f"{each.spec.name} cannot start: {tail(each.log, 1)}",
                next_step=f"correct that and start again; {each.log} has the whole log",
            )
        how = _how_it_ended(each.process.returncode)
        if len(each.deaths) > self._policy.max_restarts:
            raise ProcessFailed(
                f"{each.spec.name} {how}, for the {len(each.deaths)}th time in {self._policy.within_seconds:.0f} s;"
                f" the end of {each.log}:\n{tail(each.log)}"
            )
        delay = self._policy.first_delay_seconds * 2 ** (len(each.deaths) - 1)
        each.restart_at = now + delay
        self._notify(f"{each.spec.name} {how}; starting it again")

    def _spawn(self, spec: ProcessSpec, log: Path) -> subprocess.Popen[bytes]:
        # SPT_NOENV: setproctitle, where installed, would otherwise write over the mark in /proc.
        environment = {**self._environment, **spec.environment, guardian.MARK: self.mark, "SPT_NOENV": "1"}
        try:
            with open(log, "ab") as output:
                return subprocess.Popen(
                    list(spec.command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise ProcessFailed(f"cannot start {spec.name} ({spec.command[0]}): {error.strerror or error}") from None

    def _start_guardian(self) -> None:
        self._guardian = subprocess.Popen(
            [sys.executable, "-S", "-E", guardian.__file__, self.mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={key: value for key, value in os.environ.items() if key != guardian.MARK},
            start_new_session=True,
        )

    def _dismiss_guardian(self) -> None:
        if self._guardian is not None:
            assert self._guardian.stdin is not None
            self._guardian.stdin.close()
            self._guardian.wait()
            self._guardian = None


def peak_memory_bytes(process_id: int) -> int:
    """Return the largest resident size that a living process has had, bytes; 0 if it is gone."""
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process_id}/status").read_text()):
            return int(found[1]) * 1024
    return 0


def cpu_seconds(process_id: int) -> float:
    """Return the processor seconds that a living process has used, user and system; 0 if it is gone."""
    with contextlib.suppress(OSError):
        # The second field is the program's name in parentheses, which may hold anything; utime and stime follow it.
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def tail(log: Path, lines: int = 12) -> str:
    """Return the last lines of a log file."""
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def _signal_group(process_id: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_id, number)


def _how_it_ended(return_code: int) -> str:
    if return_code < 0:
        try:
            return f"was ended by {signal.Signals(-return_code).name}"
        except ValueError:
            return f"was ended by signal {-return_code}"
    return f"ended with exit code {return_code}"
