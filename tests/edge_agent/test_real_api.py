"""The agent against the real API on a socket, with the worker's real stages in this process."""

import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from assets.models import save_language_model
from assets.tensors import read_tensors
from edge_agent import __main__, cycle, identity, settings
from edge_agent.__main__ import build_agent
from edge_agent.client import CloudClient
from edge_agent.cycle import Agent, Outcome, RoundFiles, TrainedUpdate
from edge_agent.errors import CloudUnavailable, NotAuthorised
from edge_agent.ledger import Ledger
from edge_agent.local_state import LocalState
from edge_agent.outbox import OutboxEntry
from edge_agent.rotation import CredentialRotation
from persistence import devices, jobs, runs, traffic
from protocol.assignments import Assignment
from protocol.devices import Heartbeat
from protocol.runs import RoundMetrics, Run
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
def whole(tmp_path: Path, migrated_sqlite: Path, world: TinyWorld) -> Iterator[Whole]:
    server, home = tmp_path / "server", tmp_path / "home"
    server.mkdir()
    home.mkdir()
    shutil.copy(migrated_sqlite, server / "cotune.sqlite3")
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
        key = current.signing_key
        assert key is not None
        with CloudClient(
            api.url, current.credential, ledger, stop, now=lambda: datetime.now(UTC), signing_key=key
        ) as client:
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


def test_devices_of_different_ranks_complete_their_rounds(whole: Whole, tmp_path: Path) -> None:
    """The run's rank is 2; the second device's owner allows 1. Real training, the real API, the worker's stages."""
    other = tmp_path / "small"
    other.mkdir()
    data = whole.world.config.data
    identity.enrol(
        other,
        server=whole.api.url,
        token=whole.api.token(),
        name="phone",
        model=whole.world.config.model.path,
        data=str(data.train),
        test=None,
        domain=None,
        now=lambda: datetime.now(UTC),
    )
    path = other / settings.CONFIG_FILE
    path.write_text(path.read_text("utf-8").replace("[training]\n", "[training]\nmax_adapter_rank = 1\n"), "utf-8")
    current = settings.load(other, {})
    profile = identity.check_inputs(current.config, [])
    strategy = {"device_ranks": "declared", "aggregation": "exact_svd"}
    with __main__.connect(current, whole.agent.stop) as client:
        client.heartbeat(Heartbeat(profile=profile))
        run = whole.create_run(rounds=2, min_updates=2, strategy=strategy)
        small = build_agent(current, client, whole.agent.stop)
        for number in (1, 2):
            assert [cycle.run_once(each) for each in (whole.agent, small)] == [Outcome.SUBMITTED] * 2
            whole.work()
            played = whole.worker.round(run.run_id, number)
            assert played.status is RoundStatus.PUBLISHED
            assert whole.worker.statuses(run.run_id, number) == [AssignmentStatus.COUNTED] * 2
            metrics = RoundMetrics.model_validate(played.metrics)
            assert metrics.update_ranks == {current.device_id: 1}
            assert set(metrics.update_norms) == {whole.device_id, current.device_id}
            assert 0 <= metrics.aggregation_errors["relative_error"] < 1
    assert whole.worker.run(run.run_id).status is RunStatus.COMPLETED
    # Half the rank, half the bytes (and the header).
    sent = [Ledger(home / "ledger.jsonl", lambda: datetime.now(UTC)).totals() for home in (whole.home, other)]
    assert sent[1]["adapter_delta"] < 0.9 * sent[0]["adapter_delta"]
    published = read_tensors(whole.worker.blobs.path(whole.worker.version(run.run_id, 2).proxy_adapter_sha256 or ""))[0]
    assert {tensor.shape[0] for name, tensor in published.items() if "lora_A" in name} == {2}


def test_an_enrolment_whose_answer_was_lost_spends_a_one_time_token_once(
    tmp_path: Path, migrated_sqlite: Path, world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(migrated_sqlite, tmp_path / "cotune.sqlite3")
    home, data = tmp_path / "home", world.config.data
    home.mkdir()
    with running_api(settings_in(tmp_path)) as api:
        enrol = partial(
            identity.enrol, home, server=api.url, token=api.token(uses=1), name="tablet",
            model=world.config.model.path, data=str(data.train), test=None, domain=None, now=lambda: datetime.now(UTC),
        )  # fmt: skip

        def die(*_: object) -> None:
            raise Killed

        with monkeypatch.context() as killed:
            killed.setattr(identity, "write_credential", die)  # the answer is here, and nothing of it on disk yet
            with pytest.raises(Killed):
                enrol()
        device_id = enrol().config.device.id
        assert [each["device_id"] for each in api.operator.get("/v1/devices").json()["items"]] == [device_id]
        with __main__.connect(settings.load(home, {}), threading.Event()) as client:
            assert client.whoami().device_id == device_id


def test_a_device_that_waits_for_approval_works_once_it_is_approved(
    tmp_path: Path, migrated_sqlite: Path, world: TinyWorld
) -> None:
    shutil.copy(migrated_sqlite, tmp_path / "cotune.sqlite3")
    home, data = tmp_path / "home", world.config.data
    home.mkdir()
    with running_api(settings_in(tmp_path)) as api:
        enrolled = identity.enrol(
            home, server=api.url, token=api.token(approval=True), name="tablet", model=world.config.model.path,
            data=str(data.train), test=None, domain=None, now=lambda: datetime.now(UTC),
        )  # fmt: skip
        assert enrolled.waits_for_approval
        current = settings.load(home, {})
        with __main__.connect(current, threading.Event()) as client:
            client.heartbeat(Heartbeat())
            agent = build_agent(current, client, threading.Event())
            with pytest.raises(CloudUnavailable, match="waits for an operator's approval") as caught:
                cycle.run_once(agent, wait_seconds=0)
            assert caught.value.retry_after_seconds == 15
            assert api.operator.post(f"/v1/devices/{current.device_id}/approve").json()["status"] == "registered"
            assert cycle.run_once(agent, wait_seconds=0) is Outcome.IDLE


def test_a_credential_is_replaced_and_a_kill_before_it_is_stored_loses_nothing(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(home: Path, credential: str) -> None:
        raise Killed

    before = settings.load(whole.home, {}).credential
    rotation = CredentialRotation(whole.home, whole.client, 30, lambda: datetime.now(UTC))
    rotation.when_due()  # It is young.
    with monkeypatch.context() as patch:
        patch.setattr("edge_agent.rotation.write_credential", die)
        with pytest.raises(Killed):
            rotation.rotate()
    assert settings.load(whole.home, {}).credential == before
    assert whole.client.whoami().device_id == whole.device_id
    # Stored, and killed before it was used: the next process has the new one, and the old one is good until then.
    with monkeypatch.context() as patch:
        patch.setattr(whole.client, "use_credential", lambda credential: die(whole.home, credential))
        with pytest.raises(Killed):
            rotation.rotate()
    assert whole.client.whoami().device_id == whole.device_id
    current = settings.load(whole.home, {})
    assert current.credential != before
    with __main__.connect(current, threading.Event()) as client:
        assert client.whoami().device_id == whole.device_id
    with pytest.raises(NotAuthorised):
        whole.client.whoami()


def test_an_old_credential_is_replaced_between_two_cycles(whole: Whole) -> None:
    path = whole.home / settings.CREDENTIAL_FILE
    before = path.read_text()
    old = time.time() - 31 * 86_400
    os.utime(path, (old, old))
    assert whole.agent.rotation is not None
    whole.agent.rotation.when_due()
    assert path.read_text() != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert cycle.run_once(whole.agent, wait_seconds=0) is Outcome.IDLE
    whole.agent.rotation.when_due()
    assert len(whole.api.operator.get("/v1/devices").json()["items"]) == 1


def test_a_wrong_clock_is_corrected_by_the_servers(whole: Whole) -> None:
    current = settings.load(whole.home, {})
    ledger = Ledger(whole.home / "ledger.jsonl", lambda: datetime.now(UTC))
    for wrong in (timedelta(days=-400), timedelta(hours=2)):
        clock = partial(lambda by: datetime.now(UTC) + by, wrong)
        with CloudClient(
            whole.api.url, current.credential, ledger, threading.Event(), now=clock, signing_key=current.signing_key
        ) as client:
            assert client.whoami().device_id == whole.device_id
            assert client.heartbeat(Heartbeat()).next_within_seconds == 30
