"""Processes whose machines' clocks are an hour wrong: a library of the test's own stands before the C library's."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from persistence import schema
from persistence.clock import utc_now
from protocol.events import EventType
from protocol.statuses import RunStatus
from tests.worker.cloud import Cloud
from tests.worker.processes import Processes
from worker.celery_app import make_app, sender
from worker.settings import Settings

pytestmark = pytest.mark.services

SOURCE = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long skew(void) { const char *text = getenv("TEST_CLOCK_SKEW"); return text ? atol(text) : 0; }

int clock_gettime(clockid_t clock, struct timespec *found) {
    int answer = syscall(SYS_clock_gettime, clock, found);
    if (!answer && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) found->tv_sec += skew();
    return answer;
}
int gettimeofday(struct timeval *found, void *zone) {
    int answer = syscall(SYS_gettimeofday, found, zone);
    if (!answer) found->tv_sec += skew();
    return answer;
}
time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared library that shifts the clock of a process by TEST_CLOCK_SKEW seconds."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler in PATH")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(SOURCE)
    built = folder / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(built), str(folder / "clock.c")], check=True)
    return built


def skewed(library: Path, seconds: int) -> dict[str, str]:
    return {"LD_PRELOAD": str(library), "TEST_CLOCK_SKEW": str(seconds)}


def test_the_library_shifts_the_clock(library: Path) -> None:
    program = ["python3", "-c", "import time, datetime; print(time.time(), datetime.datetime.now().timestamp())"]
    shown = subprocess.run(program, env=skewed(library, -3600), capture_output=True, text=True, check=True).stdout
    for each in shown.split():
        assert abs(float(each) + 3600 - utc_now().timestamp()) < 60


@pytest.fixture
def cloud_and_processes(served: Settings) -> Iterator[tuple[Cloud, Processes]]:
    schema.upgrade(served.database_url)
    settings = replace(served, lease_seconds=20.0, sweep_seconds=0.5)
    app = make_app(settings)
    cloud, processes = Cloud(settings, dispatch=sender(app)), Processes(settings)
    yield cloud, processes
    processes.kill_all()
    cloud.database.dispose()
    app.close()


@pytest.mark.parametrize("worker_ahead", [-3600, 3600])
def test_an_hour_between_worker_and_controller_changes_nothing(
    worker_ahead: int, cloud_and_processes: tuple[Cloud, Processes], library: Path
) -> None:
    cloud, processes = cloud_and_processes
    run = cloud.create_run(None, strategy={"name": "standalone"}, public_data=None)
    processes.start("--controller", environment=skewed(library, -worker_ahead))
    processes.start(environment=skewed(library, worker_ahead))
    processes.wait_for("round 1", lambda: cloud.run(run.run_id).status is RunStatus.RUNNING, 300)
    events = cloud.events(run.run_id)
    claims = [each for each in events if each.type is EventType.JOB_CLAIMED]
    assert len(claims) == 1, "no lease ran out"
    opened = cloud.round(run.run_id)
    assert abs((utc_now() - opened.opened_at).total_seconds()) < 600, "stamped by the database's clock"
    processes.stop()


def test_a_dead_workers_job_is_taken_in_time_by_one_whose_clock_is_behind(
    cloud_and_processes: tuple[Cloud, Processes], library: Path
) -> None:
    cloud, processes = cloud_and_processes
    run = cloud.create_run(None, strategy={"name": "standalone"}, public_data=None)
    ahead = processes.start(environment=skewed(library, 3600))

    def claimed() -> bool:
        return any(each.type is EventType.JOB_CLAIMED for each in cloud.events(run.run_id))

    processes.wait_for("a claim", claimed, 300)
    processes.kill(ahead)  # it imports torch, which takes seconds: the stage has not ended
    if cloud.run(run.run_id).status is RunStatus.RUNNING:
        pytest.skip("the stage was over before the worker could be killed")
    processes.start("--controller", environment=skewed(library, -3600))
    processes.start(environment=skewed(library, -3600))
    processes.wait_for("round 1", lambda: cloud.run(run.run_id).status is RunStatus.RUNNING, 300)
    resent = next(each for each in cloud.events(run.run_id) if each.type is EventType.JOB_RESENT)
    assert "ran out" in resent.data["reason"]
    processes.stop()
