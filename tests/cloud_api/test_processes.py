"""Several processes behind one socket: they serve, come back, end together, and wake each other's waiters."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cloud_api.running_api import RunningApi, eventually, running_api, settings_in
from tests.cloud_api.test_process import Process, refused, started


def children(pid: int) -> set[int]:
    return {int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@contextlib.contextmanager
def two_processes(folder: Path) -> Iterator[tuple[Process, set[int]]]:
    with started(folder / "home", folder / "api.log", COTUNE_API_PROCESSES="2") as process:
        with process.operator() as operator:  # connections wait until the first process accepts them
            assert operator.get("/health").status_code == 200
        eventually(lambda: len(children(process.popen.pid)) == 2)
        serving = children(process.popen.pid)
        try:
            yield process, serving
        finally:
            for pid in filter(alive, serving):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_a_process_that_is_killed_is_replaced_while_the_other_serves(tmp_path: Path) -> None:
    with two_processes(tmp_path) as (process, serving), process.operator() as operator:
        killed = min(serving)
        os.kill(killed, signal.SIGKILL)
        statuses = {operator.get("/v1/runs").status_code for _ in range(20)}
        assert statuses == {200}
        eventually(lambda: len(children(process.popen.pid) - {killed}) == 2, 10)
        begun = time.monotonic()
        now = children(process.popen.pid)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(10) == 0
        assert time.monotonic() - begun < 6
        assert not any(alive(pid) for pid in now)
    assert "process_died" in (tmp_path / "api.log").read_text()


def test_any_process_answers_with_the_numbers_of_all(tmp_path: Path) -> None:
    with two_processes(tmp_path) as (process, _):
        for _ in range(20):
            with process.operator() as operator:  # a connection of its own, which either may accept
                assert operator.get("/v1/runs").status_code == 200
        for _ in range(6):
            with process.operator() as operator:
                assert 'cotune_http_requests_total{method="GET",route="/v1/runs",status="200"} 20.0' in (
                    operator.get("/metrics").text
                )


def test_the_processes_end_with_their_parent_even_if_it_is_killed(tmp_path: Path) -> None:
    with two_processes(tmp_path) as (process, serving):
        os.kill(process.popen.pid, signal.SIGKILL)
        process.popen.wait(10)
        eventually(lambda: not any(alive(pid) for pid in serving), 8)


def test_a_number_of_processes_that_cannot_be_used(tmp_path: Path) -> None:
    assert "COTUNE_API_PROCESSES: expected a whole number from 1 to 64, got '0'" in refused(
        tmp_path, "--port", "0", COTUNE_API_PROCESSES="0"
    )


@pytest.fixture
def two_apis(tmp_path: Path, migrated_sqlite: Path) -> Iterator[tuple[RunningApi, RunningApi]]:
    """Two whole applications on one database: what they know of each other is what the database says."""
    settings = settings_in(tmp_path)
    shutil.copy(migrated_sqlite, tmp_path / "cotune.sqlite3")
    with running_api(settings) as one, running_api(settings) as other:
        yield one, other


def test_a_device_that_waits_at_one_process_wakes_for_a_commit_in_another(
    two_apis: tuple[RunningApi, RunningApi],
) -> None:
    one, other = two_apis
    device = one.enrol()
    with ThreadPoolExecutor(1) as threads:
        poll = threads.submit(device.poll, 25)
        time.sleep(0.5)
        assert not poll.done()
        begun = time.monotonic()
        run = other.running_run(device)
        assignment = poll.result(10)
    assert time.monotonic() - begun < 5
    assert assignment is not None
    assert assignment.run_id == run.run_id
