"""A real API process for the commands to talk to, and a way to call `cotune` in this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

import pytest

from command_line import main as cotune
from command_line.api_client import ApiClient
from command_line.embedded import HOST, cloud_environment, cloud_specs, wait_until_ready, without_our_settings
from command_line.folders import make_operator_key
from command_line.ports import free_port
from command_line.supervisor import Supervisor


@dataclass(frozen=True)
class RunningApi:
    """An API without a worker: runs are created and stay pending."""

    address: str
    key: str
    home: Path


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class Cotune(Protocol):
    """Calls the command line."""

    def __call__(self, *arguments: str) -> Ended: ...


@contextmanager
def served(home: Path) -> Iterator[RunningApi]:
    """Start an API with its state in `home`."""
    key = make_operator_key(home).read_text(encoding="ascii").strip()
    port = free_port()
    with Supervisor(home, notify=print, environment=without_our_settings()) as supervisor:
        supervisor.start(cloud_specs(HOST, port, cloud_environment(home))[0])
        with ApiClient(f"http://{HOST}:{port}", key) as client:
            wait_until_ready(client, supervisor)
        yield RunningApi(f"http://{HOST}:{port}", key, home)


@pytest.fixture(scope="package")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    with served(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture
def run_cotune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cotune:
    """`cotune` with nothing configured on the machine."""
    for name in ("COTUNE_SERVER", "COTUNE_OPERATOR_KEY", "COTUNE_OPERATOR_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr("sys.argv", ["cotune", *arguments])
        with pytest.raises(SystemExit) as ended:
            cotune.main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def connected(run_cotune: Cotune, api: RunningApi, monkeypatch: pytest.MonkeyPatch) -> Cotune:
    """`cotune` with the address and the key of the running API."""
    monkeypatch.setenv("COTUNE_SERVER", api.address)
    monkeypatch.setenv("COTUNE_OPERATOR_KEY", api.key)
    return run_cotune


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables so wide that no cell is folded."""
    monkeypatch.setattr("command_line.output.PLAIN_WIDTH", 400)


class _Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return None


@pytest.fixture
def not_ours() -> Iterator[str]:
    """The address of a web server that is not Cotune's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
