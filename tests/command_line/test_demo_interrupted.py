"""A demo that is ended early, at different moments: exit code 130, and nothing left."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from command_line import guardian
from tests.command_line.test_up import marks_of_children

COMMAND = [sys.executable, "-c", "from command_line.main import main; main()", "demo"]


@contextmanager
def started_demo(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """A demo in a session of its own, with an empty cache and its own folder for temporary files."""
    (folder / "tmp").mkdir()
    environment = os.environ | {"COTUNE_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
    demo = subprocess.Popen(
        [*COMMAND, "--out", str(folder / "results" / "demo.json")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        yield demo
    finally:
        with contextlib.suppress(ProcessLookupError):
            demo.kill()
        demo.wait()
        assert demo.stdout is not None
        demo.stdout.close()


def mark_of(demo: "subprocess.Popen[str]") -> str:
    """Wait until the demo has started marked processes of some weight, and return the mark."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        marks = marks_of_children(demo.pid)
        if len(marks) == 1 and guardian.marked_processes(next(iter(marks))):
            return marks.pop()
        assert demo.poll() is None, demo.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("the demo started nothing")


def left_behind(mark: str) -> list[str]:
    """The state and the command line of each living process with the mark, so that a failure says which it was."""
    found = []
    for process in guardian.marked_processes(mark):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found.append(f"{Path(f'/proc/{process}/stat').read_text().split()[:4]} {command}")
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_base_models_are_built(tmp_path: Path, number: signal.Signals) -> None:
    with started_demo(tmp_path) as demo:
        mark = mark_of(demo)
        started = time.monotonic()
        demo.send_signal(number)
        said, _ = demo.communicate(timeout=30)
        assert demo.returncode == 130, said
        assert "Traceback" not in said
        assert time.monotonic() - started < 15
    assert left_behind(mark) == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "results" / "demo.json").exists()


def test_kill_9_while_base_models_are_built(tmp_path: Path) -> None:
    with started_demo(tmp_path) as demo:
        mark = mark_of(demo)
        demo.kill()
        demo.wait()
    deadline = time.monotonic() + 15
    while guardian.marked_processes(mark):
        assert time.monotonic() < deadline
        time.sleep(0.05)
