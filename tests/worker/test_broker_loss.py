"""A worker whose Redis is killed at the worst moment: a Redis server of the test's own, from PATH."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from protocol.statuses import JobKind
from tests.worker.processes import environment_of
from worker.celery_app import make_app
from worker.settings import Settings

pytestmark = pytest.mark.services

# The task ends while the broker is away, so its acknowledgement fails.
WORKER = """
import os, signal, sys, time
from worker.celery_app import consume, make_app
from worker.settings import Settings
from protocol.statuses import TRAINING_QUEUE, JobKind

settings = Settings.from_environment(os.environ)
app = make_app(settings)

def run(job_id):
    print(job_id, flush=True)
    if job_id == "kill":
        os.kill(int(sys.argv[1]), signal.SIGKILL)
        time.sleep(0.3)

app.task(run, name=JobKind.PREPARE_RUN.task_name, acks_late=True, ignore_result=True)
consume(app, TRAINING_QUEUE, settings, node="trainer@test")
"""


@dataclass
class OwnRedis:
    """A server that keeps nothing on disk."""

    folder: Path
    port: int

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(redis.ConnectionError):
                client.ping()
                break
            time.sleep(0.02)
        client.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not in PATH")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = OwnRedis(tmp_path, probe.getsockname()[1])
    server.start()
    yield server
    server.stop()


def test_a_worker_works_on_after_an_acknowledgement_that_found_no_broker(own_redis: OwnRedis, tmp_path: Path) -> None:
    """Without `celery_app.Request` the worker lives on, connected to nothing, and never takes a message again."""
    settings = Settings.from_environment(
        {"COTUNE_HOME": str(tmp_path), "COTUNE_BROKER_URL": f"redis://127.0.0.1:{own_redis.port}/0"}
    )
    output = tmp_path / "worker.log"
    with output.open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(own_redis.process.pid)],
            env={"PYTHONPATH": ":".join(sys.path), **environment_of(settings)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    app = make_app(settings)

    def send(job_id: str) -> None:
        app.send_task(JobKind.PREPARE_RUN.task_name, args=[job_id])

    try:
        send("kill")
        assert own_redis.process.wait(40) == -signal.SIGKILL
        time.sleep(0.6)  # the task ends in the meantime
        own_redis.start()
        send("after")
        deadline = time.monotonic() + 30
        while "\nafter\n" not in output.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "\nafter\n" in output.read_text(), output.read_text()[-2000:]
        assert worker.poll() is None
    finally:
        worker.kill()
        worker.wait()
        app.close()
