"""Several processes behind one listening socket: one process of Python uses one core.

The parent holds the socket, starts the processes and restarts those that die; it serves nothing itself. The processes
share nothing but the socket and the database: the event feed wakes who waits in any of them (`cloud_api.feed`). Their
standard input is a pipe that only the parent can write to, so that they end when it is gone, however it went.

Rejected: uvicorn's own supervisor, which imports the application anew by name and so reads the settings in each
process, and does not end its processes when it is killed.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from types import FrameType

import structlog
from prometheus_client.multiprocess import mark_process_dead

from cloud_api.request_metrics import SHARED_FOLDER

POLL_SECONDS = 0.1
STOP_SECONDS = 5.0
"""From the signal to the end of the processes; what is left then is killed."""
STEADY_SECONDS = 10.0
"""A process that lived so long is restarted at once; one that did not, after a delay that doubles."""
FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 10.0

log = structlog.get_logger(__name__)


@dataclass
class _Process:
    popen: "subprocess.Popen[bytes]"
    started: float
    delay_seconds: float = FIRST_DELAY_SECONDS
    restart_at: float | None = None


def serve_in_processes(count: int, listener: socket.socket, *, hopeless_exit_code: int) -> int:
    """Serve with `count` processes until SIGTERM or SIGINT; return the exit code.

    The database's schema must be there.

    Args:
        count: how many processes, at least one.
        listener: bound and listening; closed at the end.
        hopeless_exit_code: a process that ends with it would do so again; it ends the others too, and is returned.
    """
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    lifeline, held = os.pipe()
    metrics = tempfile.mkdtemp(prefix="cotune-metrics-")
    os.environ[SHARED_FOLDER] = metrics
    processes = [_Process(_start(listener, lifeline), time.monotonic()) for _ in range(count)]
    code = 0
    try:
        while code == 0 and not stop.wait(POLL_SECONDS):
            for each in processes:
                if _look_after(each, listener, lifeline) == hopeless_exit_code:
                    code = hopeless_exit_code
    finally:
        _end([each.popen for each in processes])
        os.close(lifeline)
        os.close(held)
        listener.close()
        shutil.rmtree(metrics, ignore_errors=True)
    return code


def _start(listener: socket.socket, lifeline: int) -> "subprocess.Popen[bytes]":
    descriptor = listener.fileno()
    command = [sys.executable, "-m", "cloud_api", "--socket", str(descriptor)]
    # A session of its own: Ctrl-C at a terminal is for the parent, which then ends the processes.
    return subprocess.Popen(command, stdin=lifeline, pass_fds=(descriptor,), start_new_session=True)


def _look_after(process: _Process, listener: socket.socket, lifeline: int) -> int | None:
    """Restart a process that died, when it is time to. Return its exit code when it is first seen to be dead."""
    now = time.monotonic()
    code = None
    if process.restart_at is None:
        code = process.popen.poll()
        if code is None:
            return None
        log.error("process_died", pid=process.popen.pid, exit_code=code)
        # Nobody waits in it any more.
        mark_process_dead(process.popen.pid, os.environ[SHARED_FOLDER])  # type: ignore[no-untyped-call]
        steady = now - process.started > STEADY_SECONDS
        process.delay_seconds = FIRST_DELAY_SECONDS if steady else min(2 * process.delay_seconds, LONGEST_DELAY_SECONDS)
        process.restart_at = now if steady else now + process.delay_seconds
    if now >= process.restart_at:
        process.popen, process.started, process.restart_at = _start(listener, lifeline), now, None
        log.info("process_restarted", pid=process.popen.pid)
    return code


def _end(processes: "list[subprocess.Popen[bytes]]") -> None:
    for each in processes:
        each.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for each in processes:
        try:
            each.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.kill()
            each.wait()
