"""Progress reports: few, never in the way, and the server's no is heard."""

import threading
import time
from typing import Any

import pytest

from edge_agent.backoff import Backoff
from edge_agent.client import CloudClient
from edge_agent.errors import Cancelled, NotAuthorised, Stopped
from edge_agent.reporting import TrainingReporter
from tests.edge_agent.conftest import make_assignment
from tests.edge_agent.fake_cloud import FakeCloud, problem


def make_reporter(
    client: CloudClient, cloud: FakeCloud, stop: threading.Event, *, interval: float = 0.05, **assignment: Any
) -> TrainingReporter:
    return TrainingReporter(
        client,
        make_assignment(cloud, **assignment),
        stop,
        backoff=Backoff(lambda: 0.0),
        clock=time.monotonic,
        interval_seconds=interval,
    )


def train_until(reporter: TrainingReporter, done: Any, seconds: float = 3.0) -> int:
    """Report steps as fast as a training loop could, until `done()`; return how many."""
    deadline = time.monotonic() + seconds
    step = 0
    while not done() and time.monotonic() < deadline:
        step += 1
        reporter.on_progress("mutual_learning", step, 1000, {"slm": 1.0, "bad": float("nan")})
        time.sleep(0.001)
    assert done(), "did not happen in time"
    return step


def test_many_steps_make_few_reports_and_the_newest_counts(
    client: CloudClient, cloud: FakeCloud, stop: threading.Event
) -> None:
    with make_reporter(client, cloud, stop) as reporter:
        steps = train_until(reporter, lambda: len(cloud.requests("progress")) >= 3)
    assert steps > 3 * len(cloud.requests("progress"))
    body = cloud.requests("progress")[-1].body
    assert b'"slm":1.0' in body
    assert b"bad" not in body


@pytest.mark.parametrize(("status", "code"), [(409, "round_closed"), (404, "assignment_not_found")])
def test_a_closed_round_cancels_training(
    client: CloudClient, cloud: FakeCloud, stop: threading.Event, status: int, code: str
) -> None:
    cloud.fail("progress", problem(status, code))
    with make_reporter(client, cloud, stop) as reporter, pytest.raises(Cancelled, match=code):
        train_until(reporter, lambda: False)


def test_a_revoked_device_stops_training(client: CloudClient, cloud: FakeCloud, stop: threading.Event) -> None:
    cloud.fail("progress", problem(403, "device_revoked"))
    with make_reporter(client, cloud, stop) as reporter, pytest.raises(NotAuthorised):
        train_until(reporter, lambda: False)


def test_a_server_that_is_down_or_complains_is_no_reason_to_stop(
    client: CloudClient, cloud: FakeCloud, stop: threading.Event
) -> None:
    cloud.fail("progress", problem(503, "unavailable"), times=2)
    cloud.fail("progress", problem(422, "invalid_field"))
    with make_reporter(client, cloud, stop) as reporter:
        train_until(reporter, lambda: len(cloud.requests("progress")) >= 5)


def test_a_hanging_server_blocks_neither_training_nor_its_end(
    client: CloudClient, cloud: FakeCloud, stop: threading.Event
) -> None:
    cloud.fail("progress", lambda handler: time.sleep(2), times=10)
    started = time.monotonic()
    with make_reporter(client, cloud, stop) as reporter:
        train_until(reporter, lambda: bool(cloud.requests("progress")))
        before = time.monotonic()
        reporter.on_progress("mutual_learning", 1, 2, {})
        assert time.monotonic() - before < 0.5  # it would hang for 2
    assert time.monotonic() - started < 1


def test_a_stop_is_raised_at_the_next_step(client: CloudClient, cloud: FakeCloud, stop: threading.Event) -> None:
    with make_reporter(client, cloud, stop) as reporter:
        stop.set()
        with pytest.raises(Stopped):
            reporter.on_progress("domain_tuning", 1, 2, {})
