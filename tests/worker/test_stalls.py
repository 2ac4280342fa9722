"""A worker that stands still ends, says why where it can, and another one does its job."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from persistence import schema
from protocol.events import EventType
from protocol.exit_codes import ServiceExit
from protocol.statuses import RunStatus
from tests.worker.cloud import Cloud
from tests.worker.processes import Processes
from worker.celery_app import make_app, sender
from worker.settings import Settings

# `worker.preparation`, in the way of a worker: it says that it is in the stage, then never moves again.
HINDRANCE = """
import sys
class Preparation:
    @staticmethod
    def prepare(work):
        import ctypes, resource, threading, time
        print("in the stage", flush=True)
        {hang}
module = type(sys)("worker.preparation")
module.prepare = Preparation.prepare
sys.modules["worker.preparation"] = module
"""
HANGS = {
    "asleep in a native call": "time.sleep(10_000)",
    "asleep with the interpreter's lock": "ctypes.PyDLL(None).sleep(10_000)",
    "no memory for another thread": (
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "        ready = threading.Event()\n"
        "        while True:\n"
        "            try:\n"
        "                threading.Thread(target=ready.wait).start()\n"
        "            except (RuntimeError, MemoryError):\n"
        "                ready.wait()"
    ),
}
ENDS = {"asleep in a native call": ServiceExit.STALLED, "asleep with the interpreter's lock": -signal.SIGKILL}
"""With no memory it depends on what still fits."""


CASES = [
    *(("settings", hang) for hang in HANGS),
    pytest.param("served", "asleep in a native call", marks=pytest.mark.services),
]


@pytest.fixture
def cloud_and_processes(request: pytest.FixtureRequest) -> Iterator[tuple[Cloud, Processes]]:
    """On SQLite and the embedded broker (`settings`), or PostgreSQL and Redis (`served`); impatient."""
    given: Settings = request.getfixturevalue(request.param)
    schema.upgrade(given.database_url)
    impatient = replace(given, lease_seconds=5.0, sweep_seconds=0.5, resend_after_seconds=1.0, stall_seconds=6.0)
    app = make_app(impatient)
    cloud, processes = Cloud(impatient, dispatch=sender(app)), Processes(impatient)
    yield cloud, processes
    processes.kill_all()
    cloud.database.dispose()
    app.close()


@pytest.mark.parametrize(("cloud_and_processes", "hang"), CASES, indirect=["cloud_and_processes"])
def test_another_worker_takes_the_job_of_one_that_stands_still(
    hang: str, cloud_and_processes: tuple[Cloud, Processes], tmp_path: Path
) -> None:
    cloud, processes = cloud_and_processes
    hindrance = tmp_path / "hindrance"
    hindrance.mkdir()
    (hindrance / "sitecustomize.py").write_text(HINDRANCE.format(hang=HANGS[hang]))
    run = cloud.create_run(None, strategy={"name": "standalone"}, public_data=None)
    processes.start("--controller")
    stalled = processes.start(environment={"PYTHONPATH": ":".join([str(hindrance), *sys.path])})
    processes.wait_for("the stage", lambda: "in the stage" in processes.log.read_text(), 300)
    code = processes.wait_for("the worker's end", lambda: processes.ended(stalled), 300)
    expected = {ServiceExit.STALLED, -signal.SIGKILL} if "memory" in hang else {ENDS[hang]}
    assert code in expected, processes.tail()

    processes.start()
    processes.wait_for("round 1", lambda: cloud.run(run.run_id).status is RunStatus.RUNNING, 300)
    resent = next(event for event in cloud.events(run.run_id) if event.type is EventType.JOB_RESENT)
    log = processes.log.read_text()
    if code == ServiceExit.STALLED and "memory" not in hang:
        assert "prepare_run stood still in worker" in resent.data["reason"]
        assert "at most 6 s" in resent.data["reason"]
        assert "in prepare" in log, "the log has the stack"
    if code == -signal.SIGKILL:
        assert '"event": "worker_killed"' in log
        assert "ran out" in resent.data["reason"]
    processes.stop()


GUARDED = """
import os, sys, time
from worker.stalls import Guard
guard = Guard(grace_seconds=0.0)
print(guard.process_id, flush=True)
{work}
"""


def _guarded(work: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", GUARDED.format(work=work)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_watchdog_kills_only_who_promised_to_speak() -> None:
    silent = _guarded("guard.expect(0.3); time.sleep(600)")
    _, said = silent.communicate(timeout=60)
    assert silent.returncode == -signal.SIGKILL
    assert '"event": "worker_killed"' in said
    assert f'"process": {silent.pid}' in said
    resting = _guarded("guard.expect(0.3); guard.expect(float('inf')); time.sleep(2); guard.close(); print('well')")
    output, said = resting.communicate(timeout=60)
    assert (resting.returncode, said) == (0, "")
    assert output.endswith("well\n")


def test_the_watchdog_goes_with_its_worker_and_comes_back_when_killed() -> None:
    work = (
        "os.kill(guard.process_id, 9); os.waitpid(guard.process_id, 0); guard.expect(60); time.sleep(1.2)\n"
        "guard.expect(60); print(guard.process_id, flush=True); sys.stdin.read()"
    )
    program = [sys.executable, "-c", GUARDED.format(work=work)]
    worker = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    first, second = int(worker.stdout.readline()), int(worker.stdout.readline())
    assert first != second
    worker.kill()
    worker.communicate()
    _until(lambda: not _lives(second))


def _lives(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)
