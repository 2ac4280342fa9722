"""A process that is told to stop does, whatever it is doing."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

PROGRAM = """
import sys, threading, time
from worker.stopping import block_signals, watch_signals
block_signals()
stop = threading.Event()
watch_signals(stop, lambda: print("told", flush=True), seconds={seconds})
print("ready", flush=True)
{work}
print("ended by itself", flush=True)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def _stop(
    work: str, started: list[subprocess.Popen[str]], *signals: signal.Signals, limit_seconds: float
) -> tuple[int, str, float]:
    program = PROGRAM.format(work=work, seconds=limit_seconds)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    start = time.monotonic()
    for each in signals:
        process.send_signal(each)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output, time.monotonic() - start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_looks_at_the_event_ends_by_itself(number: signal.Signals, started: list[subprocess.Popen[str]]) -> None:
    code, output, seconds = _stop("stop.wait()", started, number, limit_seconds=30)
    assert code == 0
    assert "ended by itself" in output
    assert seconds < 15


def test_who_does_not_look_is_ended_after_the_limit(started: list[subprocess.Popen[str]]) -> None:
    # Blocked in one call: no signal handler in the main thread would run.
    code, output, seconds = _stop("time.sleep(120)", started, signal.SIGTERM, limit_seconds=0.5)
    assert code == 0
    assert "told" in output
    assert "ended by itself" not in output
    assert 0.4 < seconds < 15


def test_a_second_signal_ends_it_at_once(started: list[subprocess.Popen[str]]) -> None:
    code, _, seconds = _stop("time.sleep(120)", started, signal.SIGINT, signal.SIGINT, limit_seconds=60)
    assert code == 0
    assert seconds < 15
