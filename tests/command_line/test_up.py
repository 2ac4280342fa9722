"""`cotune up`: a whole cloud from one command, and what stands in its way."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import guardian
from command_line.exit_codes import ExitCode
from command_line.ports import free_port
from tests.command_line.conftest import Cotune


def test_a_port_in_use(run_cotune: Cotune) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run_cotune("up", "--port", port)
    assert ended.code == ExitCode.BAD_INPUT
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in ended.err
    assert "--port" in ended.err


def test_a_home_that_cannot_be_written(run_cotune: Cotune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COTUNE_HOME", str(tmp_path / "file"))
    ended = run_cotune("up")
    assert ended.code == ExitCode.BAD_INPUT
    assert "the home folder" in ended.err
    assert "COTUNE_HOME" in ended.err


def test_a_second_one_for_the_same_home(run_cotune: Cotune, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with open(tmp_path / "home" / "up.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("12345")
        lock.flush()
        ended = run_cotune("up", "--port", str(free_port()))
    assert ended.code == ExitCode.BAD_INPUT
    assert "already runs" in ended.err
    assert "12345" in ended.err


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("COTUNE_DATABASE_URL", "postgresql://root@127.0.0.1:1/none", "the database does not answer"),
        ("COTUNE_DATABASE_URL", "mysql://root@127.0.0.1/none", "expected sqlite:///<file> or postgresql://"),
        ("COTUNE_LEASE_SECONDS", "soon", "COTUNE_LEASE_SECONDS: expected seconds from 0.1 to 86400, got 'soon'"),
    ],
)
def test_settings_that_cannot_be_used_end_it_at_once(
    variable: str, value: str, said: str, run_cotune: Cotune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, value)
    ended = run_cotune("up", "--port", str(free_port()))
    assert ended.code == ExitCode.BAD_INPUT
    assert said in ended.err
    assert "cannot start" in ended.err
    assert "Traceback" not in ended.err
    assert "starting it again" not in ended.out + ended.err
    logs = [path.read_text() for path in (tmp_path / "home" / "logs").glob("*.log")]
    assert all(log.count(said) <= 1 for log in logs), "each process was started once"


def test_up_serves_until_sigterm_and_leaves_nothing(run_cotune: Cotune, tmp_path: Path) -> None:
    """Other commands on this machine then find its address and its key by themselves."""
    up = subprocess.Popen(
        [sys.executable, "-c", "from command_line.main import main; main()", "up", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ, start_new_session=True,
    )  # fmt: skip
    with up:
        assert up.stdout is not None
        said = ""
        while "Ctrl-C stops" not in said:
            line = up.stdout.readline()
            assert line, said
            said += line
        for word in ("API:", "/docs", "operator.key", "Logs:"):
            assert word in said
        mark = next(entry for entry in marks_of_children(up.pid))
        assert len(guardian.marked_processes(mark)) >= 3
        assert run_cotune("device", "list").code == 0
        started = time.monotonic()
        up.send_signal(signal.SIGTERM)
        said += up.stdout.read()
    assert up.returncode == 0, said
    assert time.monotonic() - started < 15
    assert "Stopped" in said
    assert guardian.marked_processes(mark) == []


def marks_of_children(parent: int) -> set[str]:
    """The marks that the children of a process carry, but not ours.

    Until it has begun its program, a child shows what its parent was started with: our mark, if a supervisor runs here.
    """
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    prefix = f"{guardian.MARK}=".encode()
    marks = {
        entry.removeprefix(prefix).decode()
        for child in children
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if entry.startswith(prefix)
    }
    return marks - {os.environ.get(guardian.MARK, "")}
