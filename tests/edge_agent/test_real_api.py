"""The agent against the real API on a socket, with the worker's real stages in this process."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from assets.models import save_language_model
from edge_agent import cycle, identity, settings
from edge_agent.__main__ import build_agent
from edge_agent.client import CloudClient
from edge_agent.cycle import Agent, Outcome, RoundFiles, TrainedUpdate
from edge_agent.errors import NotAuthorised
from edge_agent.ledger import Ledger
from edge_agent.local_state import LocalState
from edge_agent.outbox import OutboxEntry
from persistence import devices, jobs, runs, schema, traffic
from protocol.assignments import Assignment
from protocol.runs import Run
from protocol.statuses import AssignmentStatus, RoundStatus, RunStatus
from tests.cloud_api.running_api import RunningApi, running_api, settings_in
from tests.edge_agent.byte_trainer import ByteTrainer, OnProgress
from tests.edge_agent.test_cycle import Killed
from tests.edge_agent.tiny_world import TinyWorld, build_world
from tests.tiny_models import tiny_language_model
from tests.worker import cloud as worker_cloud
from worker.settings import Settings, prepare_folders


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    folder = tmp_path_factory.mktemp("world")
    save_language_model(tiny_language_model("llama"), folder / "llm")
    return build_world(folder)


@dataclass
class Whole:
    """API, worker and one enrolled agent."""

    api: RunningApi
    worker: worker_cloud.Cloud
    agent: Agent
    home: Path
    client: CloudClient
    device_id: str
    world: TinyWorld

    def create_run(self, **values: object) -> Run:
        run = self.worker.create_run(str(self.world.folder / "llm"), **values)
        self.work()
        return run

    def work(self) -> None:
        """Do every job that waits, as the worker does."""
        while True:
            due = self.worker.call(jobs.due_for_sending, datetime.now(UTC), 0.0)
            if not due:
                return
            for message in due:
                self.worker.runner.run(message.job_id)

    def restarted(self, **changes: object) -> Agent:
        current = settings.load(self.home, {})
        return replace(build_agent(current, self.client, self.agent.stop), **changes)  # type: ignore[arg-type]


@pytest.fixture
def whole(tmp_path: Path, world: TinyWorld) -> Iterator[Whole]:
    server, home = tmp_path / "server", tmp_path / "home"
    server.mkdir()
    home.mkdir()
    schema.upgrade(f"sqlite:///{server / 'cotune.sqlite3'}")
    worker_settings = Settings.from_environment({"COTUNE_HOME": str(server), "COTUNE_TORCH_THREADS": "1"})
    prepare_folders(worker_settings)
    worker = worker_cloud.Cloud(worker_settings)
    with running_api(settings_in(server)) as api:
        data = world.config.data
        identity.enrol(
            home,
            server=api.url,
            token=api.token(),
            name="tablet",
            model=world.config.model.path,
            data=str(data.train),
            test=str(data.test),
            domain="diary",
            now=lambda: datetime.now(UTC),
        )
        current = settings.load(home, {})
        stop = threading.Event()
        ledger = Ledger(home / "ledger.jsonl", lambda: datetime.now(UTC))
        with CloudClient(api.url, current.credential, ledger, stop, now=lambda: datetime.now(UTC)) as client:
            agent = build_agent(current, client, stop)
            yield Whole(api, worker, agent, home, client, current.device_id, world)
    worker.database.dispose()
    shutil.rmtree(server)


def test_two_rounds_from_enrolment_to_the_end_of_the_run(whole: Whole) -> None:
    assert whole.client.whoami().profile.domain == "diary"
    assert cycle.run_once(whole.agent, wait_seconds=0) is Outcome.IDLE
    run = whole.create_run(rounds=2)
    for number in (1, 2):
        assert cycle.run_once(whole.agent) is Outcome.SUBMITTED
        assert whole.worker.statuses(run.run_id, number) == [AssignmentStatus.SUBMITTED]
        whole.work()
        assert whole.worker.statuses(run.run_id, number) == [AssignmentStatus.COUNTED]
        assert whole.worker.round(run.run_id, number).status is RoundStatus.PUBLISHED
    assert whole.worker.run(run.run_id).status is RunStatus.COMPLETED
    assert cycle.run_once(whole.agent, wait_seconds=0) is Outcome.IDLE
    metrics = [whole.worker.round(run.run_id, number).devices[0].metrics for number in (1, 2)]
    assert [bool(one["before"]) for one in metrics] == [True, False]
    assert [bool(one["after"]) for one in metrics] == [False, True]
    state = whole.agent.states.before(run.run_id, 3)
    assert state is not None
    assert state.record.round_number == 2
    # What the device says that it sent is what the server says that came.
    counted = whole.worker.read(traffic.totals, run.run_id).up
    sent = Ledger(whole.home / "ledger.jsonl", lambda: datetime.now(UTC)).totals()
    assert {kind: counted[kind] for kind in ("adapter_delta", "logits")} == {
        kind: sent[kind] for kind in ("adapter_delta", "logits")
    }


def test_a_kill_between_the_submission_and_its_receipt_counts_the_update_once(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole.create_run(rounds=1)

    def die(entry: OutboxEntry, receipt: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(OutboxEntry, "keep_receipt", die)
        with pytest.raises(Killed):
            cycle.run_once(whole.agent)
    whole.work()  # the round is aggregated and the run completed before the device comes back
    trainer = ByteTrainer()
    assert cycle.run_once(whole.restarted(trainer=lambda: trainer)) is Outcome.SUBMITTED
    assert trainer.calls == []
    assert whole.worker.statuses(run.run_id) == [AssignmentStatus.COUNTED]
    assert whole.worker.version(run.run_id, 1).num_updates == 1


def test_an_upload_that_was_cut_goes_on_after_a_restart(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    run = whole.create_run(rounds=1)
    original = CloudClient.upload_part

    def die_at_the_second(client: CloudClient, assignment: object, part: object, file: Path) -> object:
        if whole.api.stored((file.parent / "adapter_delta.safetensors").read_bytes()):
            raise Killed
        return original(client, assignment, part, file)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(CloudClient, "upload_part", die_at_the_second)
        with pytest.raises(Killed):
            cycle.run_once(whole.agent)
    assert whole.worker.statuses(run.run_id) == [AssignmentStatus.UPLOADING]
    trainer = ByteTrainer()
    assert cycle.run_once(whole.restarted(trainer=lambda: trainer)) is Outcome.SUBMITTED
    assert trainer.calls == []
    assert whole.worker.statuses(run.run_id) == [AssignmentStatus.SUBMITTED]


def test_a_run_that_is_stopped_cancels_training(whole: Whole) -> None:
    run = whole.create_run(rounds=1)

    def train(on_progress: OnProgress) -> None:
        whole.worker.call(runs.stop_run, run.run_id, "enough", datetime.now(UTC))
        for step in range(10_000):
            on_progress("mutual_learning", step, 10_000, {})
            time.sleep(0.001)

    agent = whole.restarted(trainer=lambda: ByteTrainer(during=train))
    assert cycle.run_once(agent) is Outcome.LATE
    assert cycle.run_once(agent, wait_seconds=0) is Outcome.IDLE


class _Slow:
    """Trains for real, but only once the others have played the round to its end."""

    def __init__(self, whole: Whole, others: Callable[[], None]) -> None:
        self._trainer = whole.agent.trainer()
        self._others = others

    def train(
        self, assignment: Assignment, files: RoundFiles, start: LocalState | None, on_progress: OnProgress
    ) -> TrainedUpdate:
        self._others()
        return self._trainer.train(assignment, files, start, on_progress)


def test_a_device_whose_round_closed_trains_on_and_counts_in_the_next_one(whole: Whole) -> None:
    run = whole.create_run(rounds=2, late_updates="next_round")
    (quick,) = whole.worker.enrol("quick")

    def others() -> None:
        whole.worker.deliver_untrained(quick, seed=1)
        whole.work()
        assert whole.worker.round(run.run_id, 1).status is RoundStatus.PUBLISHED

    agent = whole.restarted(trainer=lambda: _Slow(whole, others))
    assert cycle.run_once(agent) is Outcome.SUBMITTED
    assert whole.worker.statuses(run.run_id) == [AssignmentStatus.LATE, AssignmentStatus.COUNTED]
    whole.worker.deliver_untrained(quick, seed=2)
    whole.work()
    assert whole.worker.statuses(run.run_id) == [AssignmentStatus.COUNTED] * 2
    assert [whole.worker.version(run.run_id, number).num_updates for number in (1, 2)] == [1, 2]
    state = whole.agent.states.before(run.run_id, 2)
    assert state is not None
    assert state.record.round_number == 1


def test_an_update_that_is_no_safetensors_file_is_refused_with_a_reason_both_can_read(whole: Whole) -> None:
    run = whole.create_run(rounds=1)
    assert cycle.run_once(whole.restarted(trainer=ByteTrainer)) is Outcome.REFUSED
    (device,) = whole.worker.round(run.run_id).devices
    assert device.status is AssignmentStatus.REJECTED
    assert "not_safetensors" in (device.reason or "")
    assert whole.agent.outbox.pending() == []


def test_a_revoked_device_is_told_so(whole: Whole) -> None:
    whole.worker.call(devices.revoke_device, whole.device_id, datetime.now(UTC))
    with pytest.raises(NotAuthorised, match="revoked"):
        cycle.run_once(whole.agent, wait_seconds=0)
