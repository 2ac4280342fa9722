"""The demo as a newcomer runs it, from an empty cache. Minutes long: `make test-slow`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import guardian
from tests.command_line.test_up import marks_of_children

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

COMMAND = [sys.executable, "-c", "from command_line.main import main; main()", "demo"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the first test, warm for the others."""
    return tmp_path_factory.mktemp("cache")


def start(cache: Path, out: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"COTUNE_CACHE": str(cache), "TMPDIR": str(out.parent)},
    )  # fmt: skip


def lines(demo: "subprocess.Popen[str]") -> Iterator[str]:
    assert demo.stdout is not None
    yield from demo.stdout


def process_id(mark: str, *words: str) -> int:
    """The process of the demo whose command line holds all of `words`."""
    for process in guardian.marked_processes(mark):
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        if all(any(word.encode() in part for part in command) for word in words):
            return process
    raise AssertionError(f"no process with {words}")


def test_the_demo_from_nothing_with_an_agent_and_the_worker_killed_on_the_way(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    said = ""
    killed: list[str] = []
    with start(cache, out, "--rounds", "2") as demo:
        for line in lines(demo):
            said += line
            if "co-plms: round 1 of 2: devices train" in line and "agent" not in killed:
                time.sleep(2)
                os.kill(process_id(marks_of_children(demo.pid).pop(), "edge_agent", "start", "tablet"), signal.SIGKILL)
                killed.append("agent")
            if "co-plms: round 1 of 2: the LLM and the proxy" in line and "worker" not in killed:
                mark = marks_of_children(demo.pid).pop()
                workers = [each for each in guardian.marked_processes(mark) if is_worker(each)]
                os.kill(workers[0], signal.SIGKILL)
                killed.append("worker")
    assert demo.returncode == 0, said
    assert killed == ["agent", "worker"]
    assert "tablet was ended by SIGKILL; starting it again" in said
    assert "worker was ended by SIGKILL; starting it again" in said
    results = json.loads(out.read_text())
    assert (results["rounds"], results["updates_counted"], results["restarts"]) == (2, 6, 2)
    assert len({device["architecture"] for device in results["devices"]}) == 3
    assert len({device["tokenizer"] for device in results["devices"]}) == 3
    assert list(tmp_path.iterdir()) == [out]


def is_worker(process: int) -> bool:
    return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[1:4] == [b"-m", b"worker", b""]


@pytest.mark.parametrize("moment", ["Enrolling", "standalone: round 1 of 3: devices train", "co-plms: preparing"])
def test_ctrl_c_at_any_moment_ends_everything(cache: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "demo.json"
    said = ""
    with start(cache, out) as demo:
        for line in lines(demo):
            said += line
            if re.search(moment, line):
                mark = marks_of_children(demo.pid).pop()
                started = time.monotonic()
                demo.send_signal(signal.SIGINT)
                break
        said += "".join(lines(demo))
    assert demo.returncode == 130, said
    assert "Traceback" not in said
    assert time.monotonic() - started < 30
    assert guardian.marked_processes(mark) == []
    assert list(tmp_path.iterdir()) == []
