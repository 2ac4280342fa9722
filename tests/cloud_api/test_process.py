"""The real process: what it loads, how it starts, refuses to start, and stops."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.cloud_api.running_api import PROFILE, plain_client

SERVICES = Path(__file__).parents[2] / "services"
HEAVY = ("torch", "transformers", "safetensors", "peft", "tokenizers", "datasets", "assets", "cotuning", "worker")


def environment(home: Path, **changed: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COTUNE_")}
    paths = {"PYTHONPATH": str(SERVICES), "PYTHONUNBUFFERED": "1", "COTUNE_HOME": str(home)}
    return kept | paths | changed


@dataclass
class Process:
    popen: subprocess.Popen[str]
    url: str
    home: Path

    def operator(self) -> httpx.Client:
        key = (self.home / "operator.key").read_text().strip()
        return plain_client(self.url, {"Authorization": f"Bearer {key}"})


@contextlib.contextmanager
def started(home: Path, log: Path, **changed: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "cloud_api", "--port", "0"]
    with log.open("w") as errors:
        popen = subprocess.Popen(
            command, env=environment(home, **changed), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert popen.stdout is not None
        line = popen.stdout.readline()
        assert line.startswith(("Cotune API on http://127.0.0.1:", "Cotune API on https://127.0.0.1:")), log.read_text()
        yield Process(popen, line.split()[3].rstrip(","), home)
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.communicate()


def test_the_application_loads_without_what_trains(tmp_path: Path) -> None:
    script = """
import json, sys
from pathlib import Path
from cloud_api.app import create_app
from cloud_api.cloud import open_cloud
from cloud_api.settings import Settings
from persistence import schema
import os
settings = Settings.from_environment(os.environ)
schema.upgrade(settings.database_url)
cloud = open_cloud(settings)
app = create_app(cloud)
app.openapi()
cloud.dispatcher.check()
print(json.dumps(sorted(sys.modules)))
"""
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), capture_output=True, text=True, check=True
    ).stdout
    loaded = set(json.loads(output))
    assert {"fastapi", "sqlalchemy", "celery", "cloud_api.app"} <= loaded
    assert loaded.isdisjoint(HEAVY)
    assert importlib.util.find_spec("torch"), "it is installed: that it is not loaded says something"


def test_a_process_serves_and_stops_within_five_seconds_whatever_waits(tmp_path: Path) -> None:
    home, log = tmp_path / "home", tmp_path / "api.log"
    with started(home, log, COTUNE_LOG_FORMAT="json") as process, process.operator() as operator:
        assert stat.S_IMODE((home / "operator.key").stat().st_mode) == 0o600
        assert operator.get("/health").json()["status"] == "ok"
        ready = operator.get("/ready").json()
        assert ready["checks"].pop("controller") == "no controller sweeps, none has swept yet"
        assert ready == {"status": "ready", "checks": {"database": "ok", "blobs": "ok", "queue": "ok"}}
        token = operator.post("/v1/enrolment-tokens", json={}).json()["token"]
        body = {"token": token, "name": "pi", "profile": PROFILE}
        credential = operator.post("/v1/devices", json=body).json()["credential"]
        run = {"name": "run", "strategy": {"name": "standalone"}, "rounds": 1}
        run_id = operator.post("/v1/runs", json=run).json()["run_id"]
        device = httpx.Client(base_url=process.url, headers={"Authorization": f"Bearer {credential}"}, timeout=40)
        with device, ThreadPoolExecutor(2) as threads:
            poll = threads.submit(device.get, "/v1/devices/me/assignment", params={"wait_seconds": 30})
            stream = threads.submit(operator.get, f"/v1/runs/{run_id}/events/stream")
            time.sleep(0.5)
            assert not poll.done()
            assert not stream.done()
            begun = time.monotonic()
            process.popen.send_signal(signal.SIGTERM)
            assert process.popen.wait(10) == 0
            assert time.monotonic() - begun < 5
            assert poll.result().status_code == 204
            assert "run.created" in stream.result().text
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert {"request_id", "method", "path", "status", "milliseconds", "timestamp"} <= set(requests[0])
    for secret in (token, credential, (home / "operator.key").read_text().strip()):
        assert secret not in log.read_text()


def test_an_upload_in_the_middle_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with started(tmp_path / "home", tmp_path / "api.log") as process, process.operator() as operator:
        token = operator.post("/v1/enrolment-tokens", json={}).json()["token"]
        body = {"token": token, "name": "pi", "profile": PROFILE}
        content = json.dumps(body).encode()
        host, port = process.url.removeprefix("http://").split(":")
        head = (
            f"POST /v1/devices HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        )
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + content[:20])
            time.sleep(0.3)
            process.popen.send_signal(signal.SIGTERM)
            assert process.popen.wait(30) == 0  # an upload may stand still for twice as long
            answer = connection.recv(65536)
        assert b" 503 " in answer
        assert b'"unavailable"' in answer


@pytest.mark.parametrize("pause", [0.0, 0.02, 0.05, 0.1], ids=lambda seconds: f"{seconds:g}s-apart")
def test_a_second_signal_and_an_interrupt_end_it_too(tmp_path: Path, pause: float) -> None:
    with started(tmp_path / "home", tmp_path / "api.log") as process:
        process.popen.send_signal(signal.SIGINT)
        time.sleep(pause)
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(10) == 0
        assert "Traceback" not in (tmp_path / "api.log").read_text()


def test_interrupts_until_its_process_is_gone_change_nothing(tmp_path: Path) -> None:
    with started(tmp_path / "home", tmp_path / "api.log") as process:
        deadline = time.monotonic() + 10
        while process.popen.poll() is None and time.monotonic() < deadline:
            process.popen.send_signal(signal.SIGINT)
            time.sleep(0.002)
        assert process.popen.returncode == 0
        assert "Traceback" not in (tmp_path / "api.log").read_text()


def refused(home: Path, *arguments: str, **changed: str) -> str:
    """Start a process that cannot start; return the one line that it says."""
    done = subprocess.run(
        [sys.executable, "-m", "cloud_api", *arguments],
        env=environment(home, **changed),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("cloud_api: ")
    return line


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(tmp_path, "--port", str(port))
    assert f"port {port} on 127.0.0.1 is in use" in line
    assert "--port" in line


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "expected a folder that can be written" in refused(tmp_path / "file" / "home", "--port", "0")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"COTUNE_DATABASE_URL": "mysql://x/y"}, "expected sqlite"),
        ({"COTUNE_DATABASE_URL": "postgresql://nobody:hunter22@127.0.0.1:1/none"}, "does not answer"),
        ({"COTUNE_BROKER_URL": "amqp://x"}, "amqp://x"),
        ({"COTUNE_OPERATOR_KEY": "short"}, "COTUNE_OPERATOR_KEY"),
        ({"COTUNE_MIGRATIONS": "/nowhere"}, "/nowhere"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, changed: dict[str, str], told: str) -> None:
    line = refused(tmp_path, "--port", "0", **changed)
    assert told in line
    assert "hunter22" not in line
