"""Whole rounds with real processes: on SQLite and the embedded broker; on PostgreSQL and Redis where they answer."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import torch

from assets.tensors import read_tensors
from cotuning.aggregation import StreamingMean
from persistence import rounds, schema, updates
from persistence.clock import utc_now
from protocol.events import EventType
from protocol.queue import queue_folder
from protocol.runs import Run
from protocol.statuses import TRAINING_QUEUE, AssignmentStatus, JobKind, PartKind, RoundStatus, RunStatus
from tests.worker.cloud import Cloud
from tests.worker.processes import Processes
from worker.celery_app import make_app, sender
from worker.settings import Settings


@pytest.fixture
def embedded(settings: Settings) -> Settings:
    """Impatient settings, so that a test of a killed worker is short."""
    return dataclasses.replace(settings, lease_seconds=5.0, sweep_seconds=0.5, resend_after_seconds=2.0)


@pytest.fixture
def embedded_cloud(embedded: Settings) -> Iterator[tuple[Cloud, Processes]]:
    yield from _cloud(embedded)


@pytest.fixture
def served_cloud(served: Settings) -> Iterator[tuple[Cloud, Processes]]:
    schema.upgrade(served.database_url)
    yield from _cloud(served)


def _cloud(settings: Settings) -> Iterator[tuple[Cloud, Processes]]:
    """The API's part is played here: it sends with the same configuration as the worker."""
    app = make_app(settings)
    cloud, processes = Cloud(settings, dispatch=sender(app)), Processes(settings)
    yield cloud, processes
    processes.kill_all()
    cloud.database.dispose()
    app.close()


def _finished(cloud: Cloud, processes: Processes, run: Run) -> None:
    def over() -> bool:
        return cloud.run(run.run_id).status in (RunStatus.COMPLETED, RunStatus.FAILED)

    processes.wait_for("the end of the run", over)
    finished = cloud.run(run.run_id)
    assert finished.status is RunStatus.COMPLETED, finished.status_reason
    assert cloud.statuses(run.run_id) == [AssignmentStatus.COUNTED] * 3
    assert cloud.version(run.run_id, 1).num_updates == 3


def _claims(cloud: Cloud, run: Run, kind: JobKind) -> list[datetime]:
    return [
        event.time
        for event in cloud.events(run.run_id)
        if event.type is EventType.JOB_CLAIMED and event.data["kind"] == kind.value
    ]


def _check_aggregate(cloud: Cloud, round_id: str) -> None:
    """theta_bar is theta + mean(delta), each delta once: bit for bit what one aggregation makes of them."""
    context = cloud.read(rounds.get_context, round_id)
    counted = cloud.read(updates.submitted_updates, round_id)
    theta, theta_bar = (
        read_tensors(cloud.blobs.path(sha256 or ""))[0]
        for sha256 in (context.base_adapter_sha256, context.aggregated_adapter_sha256)
    )
    deltas = [read_tensors(cloud.blobs.path(update.parts[PartKind.ADAPTER_DELTA]))[0] for update in counted]
    weights = [update.num_examples for update in counted]
    assert len(deltas) == 3
    once = StreamingMean()
    for weight, delta in zip(weights, deltas, strict=True):
        once.add(delta, weight)
    mean = once.result()
    for name, tensor in theta_bar.items():
        assert torch.equal(tensor, theta[name] + mean[name])
        exact = sum(weight * delta[name].double() for weight, delta in zip(weights, deltas, strict=True)) / sum(weights)
        torch.testing.assert_close(tensor, (theta[name].double() + exact).float(), rtol=1e-6, atol=1e-8)


def test_a_killed_worker_costs_seconds_and_nothing_else(embedded_cloud: tuple[Cloud, Processes], llm: str) -> None:
    """kill -9 in the middle of the aggregation; another worker finishes the round, with every update counted once."""
    cloud, processes = embedded_cloud
    devices = cloud.enrol("a", "b", "c")
    run = cloud.create_run(llm, min_updates=3)
    (queued,) = [event for event in cloud.events(run.run_id) if event.type is EventType.JOB_QUEUED]
    cloud.runner.run(queued.data["job_id"])  # prepared here: the message in the queue will find nothing to do
    for seed, device in enumerate(devices):
        cloud.deliver_untrained(device, seed=seed)
    processes.start("--controller")
    trainer = processes.start()  # it has torch to import yet, so its aggregation lasts long enough to be hit
    processes.wait_for("a claim", lambda: _claims(cloud, run, JobKind.AGGREGATE_ROUND))
    killed = utc_now()
    processes.kill(trainer)
    assert cloud.round(run.run_id).status is RoundStatus.AGGREGATING
    processes.start()
    _finished(cloud, processes, run)
    _, second = _claims(cloud, run, JobKind.AGGREGATE_ROUND)
    assert (second - killed).total_seconds() < 20
    _check_aggregate(cloud, cloud.round(run.run_id).round_id)
    processes.stop()


@pytest.mark.services
def test_a_round_on_postgresql_and_redis(served_cloud: tuple[Cloud, Processes], llm: str) -> None:
    cloud, processes = served_cloud
    processes.start("--controller")
    processes.start()
    devices = cloud.enrol("a", "b", "c")
    run = cloud.create_run(llm, min_updates=3)
    processes.wait_for("round 1", lambda: cloud.run(run.run_id).status is RunStatus.RUNNING)
    for device, slm in zip(devices, ("gpt2", "qwen2", "bloom"), strict=True):
        cloud.train(device, slm)
    _finished(cloud, processes, run)
    _check_aggregate(cloud, cloud.round(run.run_id).round_id)
    processes.stop()


def test_sigterm_gives_the_job_back_within_seconds(embedded_cloud: tuple[Cloud, Processes], llm: str) -> None:
    cloud, processes = embedded_cloud
    processes.start()
    run = cloud.create_run(llm, proxy={"layers": 1, "steps": 100_000, "batch_size": 1, "max_length": 32})
    processes.wait_for("distillation", lambda: "progress" in processes.tail())
    processes.stop()
    assert "job_abandoned" in processes.tail()
    assert "stop_forced" not in processes.tail()
    resent = [event for event in cloud.events(run.run_id) if event.type is EventType.JOB_RESENT]
    assert [event.data["reason"] for event in resent] == ["the worker was stopped"]


def test_a_lost_message_is_sent_again(embedded_cloud: tuple[Cloud, Processes]) -> None:
    """The queue forgets everything; the controller's sweep remembers."""
    cloud, processes = embedded_cloud
    run = cloud.create_run(None, strategy={"name": "standalone"}, public_data=None)
    folder = queue_folder(cloud.settings.broker_url)
    assert folder is not None
    (message,) = folder.glob("*.msg")
    message.unlink()
    processes.start("--controller")
    (again,) = processes.wait_for("the message", lambda: list(folder.glob(f"*{TRAINING_QUEUE}.msg")))
    assert (cloud.run(run.run_id).status, again != message) == (RunStatus.PENDING, True)
    processes.stop()


def test_the_controller_imports_no_torch() -> None:
    program = "import sys, worker.processes, worker.tasks; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("COTUNE_BROKER_URL", "amqp://nowhere", "amqp://nowhere"),
        ("COTUNE_BLOBS", "/dev/null/blobs", "/dev/null/blobs"),
        ("COTUNE_DATABASE_URL", "postgresql://root@127.0.0.1:1/none", "the database does not answer"),
        ("COTUNE_MIGRATIONS", "/no/migrations", "/no/migrations"),
    ],
)
def test_what_the_worker_cannot_start_with_is_named(variable: str, value: str, said: str, tmp_path: Path) -> None:
    environment = {**os.environ, "COTUNE_HOME": str(tmp_path), variable: value}
    command = [sys.executable, "-m", "worker"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
