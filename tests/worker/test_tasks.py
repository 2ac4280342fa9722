"""The task shells around the stages."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from persistence.database import JobMessage
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.queue import queue_folder
from protocol.statuses import JobKind
from tests.worker.cloud import Cloud
from tests.worker.processes import environment_of
from worker import tasks
from worker.celery_app import make_app, sender
from worker.leases import Abandoned, Lease
from worker.settings import Settings
from worker.stage import Finish, Work
from worker.tasks import register_jobs, write_result


def test_every_kind_of_job_is_a_task_by_name_in_its_queue(cloud: Cloud, settings: Settings) -> None:
    app = make_app(settings)
    register_jobs(app, cloud.runner)
    app.finalize()
    assert {name for name in app.tasks if name.startswith("cotune.")} == {kind.task_name for kind in JobKind}
    assert all(app.tasks[kind.task_name].acks_late for kind in JobKind)
    folder = queue_folder(settings.broker_url)
    assert folder is not None
    for kind in JobKind:
        sender(app)(JobMessage("job_1", kind))
    queues = sorted(path.name.partition(".")[2] for path in folder.glob("*.msg"))
    assert queues == ["cotune-training.msg"] * len(JobKind)


def test_an_unknown_job_is_nothing_to_do(cloud: Cloud) -> None:
    cloud.runner.run("job_unknown")
    assert cloud.sent == []


@pytest.mark.parametrize("away", [0, 2, 99])
def test_a_result_waits_for_the_database(cloud: Cloud, away: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "WAIT_SECONDS", (0.01, 0.01, 0.01))
    tries: list[bool] = []

    def finish(session: Session) -> None:
        tries.append(session.is_active)
        if len(tries) <= away:
            raise DomainError(ErrorCode.UNAVAILABLE, "the database does not answer")

    with Lease(lambda: True, 20, threading.Event()) as lease:
        if away < 99:
            write_result(cloud.database, finish, lease, threading.Event())
            assert len(tries) == away + 1
        else:
            with pytest.raises(DomainError, match="does not answer"):
                write_result(cloud.database, finish, lease, threading.Event())
            assert len(tries) == 4


def test_a_result_is_not_waited_for_when_the_worker_stops(cloud: Cloud) -> None:
    stop = threading.Event()
    stop.set()

    def finish(session: Session) -> None:
        raise DomainError(ErrorCode.UNAVAILABLE, "the database does not answer")

    with Lease(lambda: True, 20, stop) as lease, pytest.raises(Abandoned):
        write_result(cloud.database, finish, lease, stop)


@pytest.mark.parametrize(
    ("error", "damaged"),
    [(MemoryError(), True), (ImportError("failed to map segment"), True), (RuntimeError("a plain fault"), False)],
)
def test_a_worker_that_may_be_damaged_is_replaced(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, error: Exception, *, damaged: bool
) -> None:
    """An import that runs out of memory halfway fails ever after: such a worker would use up every attempt of a job."""

    def crash(work: Work) -> Finish:
        raise error

    monkeypatch.setattr(tasks, "load_stage", lambda kind: crash)
    told: list[str] = []
    cloud.runner.on_damage = lambda: told.append("damaged")
    run = cloud.create_run(None, strategy={"name": "standalone"}, public_data=None)
    cloud.runner.run(cloud.sent.pop())
    assert told == ["damaged"] * damaged
    (resent,) = [event for event in cloud.events(run.run_id) if event.type is EventType.JOB_RESENT]
    assert type(error).__name__ in resent.data["reason"]


def test_a_damaged_worker_ends_with_a_fault(settings: Settings, tmp_path: Path) -> None:
    """`python -m worker`, whose first job finds a module that cannot be imported."""
    hindrance = tmp_path / "hindrance"
    hindrance.mkdir()
    (hindrance / "sitecustomize.py").write_text("import sys\nsys.modules['worker.preparation'] = None\n")
    cloud = Cloud(settings, dispatch=sender(make_app(settings)))
    cloud.create_run(None, strategy={"name": "standalone"}, public_data=None)
    environment = {**os.environ, **environment_of(settings), "PYTHONPATH": ":".join([str(hindrance), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "worker"], env=environment, capture_output=True, text=True, timeout=90, check=False
    )
    cloud.database.dispose()
    assert (done.returncode, "worker_damaged" in done.stdout + done.stderr) == (1, True), done.stderr[-2000:]
