"""The controller: it sweeps by its own timer with nothing but a database, and one of several does."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from persistence import schema, sweeping
from persistence.clock import utc_now
from persistence.database import Database
from protocol.errors import DomainError
from protocol.events import EventType
from protocol.statuses import RunStatus
from tests.worker.cloud import Cloud
from tests.worker.processes import Processes
from worker.celery_app import make_app, sender
from worker.controller import Controller
from worker.settings import Settings

NOBODY = "redis://127.0.0.1:1/0"


@pytest.fixture(params=["settings", pytest.param("served", marks=pytest.mark.services)])
def without_broker(request: pytest.FixtureRequest) -> Settings:
    """SQLite or PostgreSQL, and a Redis that does not answer."""
    given: Settings = request.getfixturevalue(request.param)
    schema.upgrade(given.database_url)
    return replace(given, broker_url=NOBODY, sweep_seconds=0.2, resend_after_seconds=1.0)


@pytest.fixture
def cloud(without_broker: Settings) -> Iterator[Cloud]:
    """Its jobs are sent to the broker that is away."""
    app = make_app(without_broker)
    cloud = Cloud(without_broker, dispatch=sender(app))
    yield cloud
    cloud.database.dispose()
    app.close()


def test_deadlines_are_kept_while_the_broker_is_away(cloud: Cloud) -> None:
    cloud.enrol("absent")
    run = cloud.create_run(None, strategy={"name": "standalone"}, public_data=None, round_deadline_seconds=1.0)
    (queued,) = [event for event in cloud.events(run.run_id) if event.type is EventType.JOB_QUEUED]
    cloud.runner.run(queued.data["job_id"])  # the round is open; nobody will deliver
    processes = Processes(cloud.settings)
    processes.start("--controller")
    try:
        processes.wait_for("the end of the round", lambda: cloud.run(run.run_id).status is RunStatus.FAILED)
        waiting = cloud.create_run(None, strategy={"name": "standalone"}, public_data=None)
        processes.wait_for("a try to send", lambda: "job_not_sent" in processes.log.read_text())
        assert cloud.run(waiting.run_id).status is RunStatus.PENDING
        with cloud.database.reading() as session:
            assert sweeping.missing_controller(session) is None
        processes.stop()
    finally:
        processes.kill_all()
    with cloud.database.reading() as session:
        said = sweeping.missing_controller(session)
    assert said is not None, "it has ended its turn"
    assert said.startswith("no controller sweeps, the last sweep was")


def test_of_two_controllers_one_sweeps_and_the_other_takes_over(cloud: Cloud) -> None:
    first, second = (Controller(cloud.settings, cloud.database, cloud.blobs, owner) for owner in ("first", "second"))
    assert (first.sweep_once(), second.sweep_once(), first.sweep_once()) == (True, False, True)
    stop = threading.Event()
    stop.set()
    first.run(stop)  # ends its turn
    assert (second.sweep_once(), first.sweep_once()) == (True, False)


def test_it_goes_on_after_a_database_that_was_away(cloud: Cloud, without_broker: Settings) -> None:
    away = Database(f"sqlite:///{without_broker.home}/no/such/folder/cotune.sqlite3")
    controller = Controller(replace(without_broker, sweep_seconds=0.1), away, cloud.blobs, "one")
    with pytest.raises(DomainError, match="does not answer"):
        controller.sweep_once()
    stop = threading.Event()
    thread = threading.Thread(target=controller.run, args=(stop,))
    thread.start()
    started = utc_now()
    try:
        controller.database = cloud.database
        swept = threading.Event()
        while not swept.wait(0.05):
            with cloud.database.reading() as session:
                if sweeping.seconds_since_sweep(session) is not None:
                    swept.set()
            assert (utc_now() - started).total_seconds() < 90
    finally:
        stop.set()
        thread.join()
        away.dispose()
