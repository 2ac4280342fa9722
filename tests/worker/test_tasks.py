"""The task shells around the stages."""

import threading

import pytest
from sqlalchemy.orm import Session

from persistence.database import JobMessage
from protocol.errors import DomainError, ErrorCode
from protocol.queue import queue_folder
from protocol.statuses import SWEEP_TASK_NAME, JobKind
from tests.worker.cloud import Cloud
from worker import tasks
from worker.celery_app import make_app, sender
from worker.leases import Abandoned, Lease
from worker.settings import Settings
from worker.tasks import register_jobs, register_sweep, write_result


def test_every_kind_of_job_is_a_task_by_name_in_its_queue(cloud: Cloud, settings: Settings) -> None:
    app = make_app(settings)
    register_jobs(app, cloud.runner)
    register_sweep(app, settings, cloud.database, cloud.blobs)
    app.finalize()
    assert {name for name in app.tasks if name.startswith("cotune.")} == {
        SWEEP_TASK_NAME,
        *(kind.task_name for kind in JobKind),
    }
    assert all(app.tasks[kind.task_name].acks_late for kind in JobKind)
    folder = queue_folder(settings.broker_url)
    assert folder is not None
    for kind in JobKind:
        sender(app)(JobMessage("job_1", kind))
    app.send_task(SWEEP_TASK_NAME)
    queues = sorted(path.name.partition(".")[2] for path in folder.glob("*.msg"))
    assert queues == ["cotune-control.msg"] + ["cotune-training.msg"] * len(JobKind)


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
