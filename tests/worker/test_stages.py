"""A run in this process: real database, real store, real training, models of a few thousand parameters."""

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import update
from structlog.testing import capture_logs
from transformers.utils import is_bitsandbytes_available

from assets.models import load_language_model
from assets.tensors import read_tensors
from cotuning.product_mean import at_rank, lora_pairs
from cotuning.strategies.promotion import not_worse
from persistence import devices as persisted_devices
from persistence import jobs, rounds, runs, updates
from persistence.clock import utc_now
from persistence.errors import LeaseLost
from persistence.tables import RunRow
from protocol.assignments import ModelManifest
from protocol.devices import Heartbeat
from protocol.errors import DomainError, ErrorCode
from protocol.events import EventType
from protocol.headers import ADAPTER_FORMAT, METADATA_FORMAT, METADATA_PROXY
from protocol.runs import ModelLoading, RoundMetrics, Run, Scores
from protocol.statuses import AssignmentStatus, PartKind, RoundStatus, RunStatus
from protocol.strategies import CoPlmsSettings
from tests.tiny_models import tiny_examples
from tests.worker.cloud import PROFILE, Cloud, write_rows
from worker.co_tuning import co_tune
from worker.leases import Abandoned, Lease
from worker.memory_check import check_memory
from worker.model_cache import ModelCache
from worker.preparation import prepare
from worker.scoring import score
from worker.settings import Settings
from worker.stage import Work

ENDLESS = {"layers": 1, "steps": 100_000, "batch_size": 1, "max_length": 32}
"""Distillation that never ends by itself."""


def test_a_whole_run(cloud: Cloud, llm: str) -> None:
    devices = cloud.enrol("a", "b", "c")
    rows = write_rows(cloud.settings.home / "test.jsonl", tiny_examples(6, kind="sum"))
    run = cloud.create_run(llm, rounds=2, min_updates=3, evaluation_data=rows)
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.RUNNING
    for number in (1, 2):
        for device, slm in zip(devices, ("gpt2", "qwen2", "bloom"), strict=True):
            cloud.train(device, slm)
        cloud.work()
        played = cloud.round(run.run_id, number)
        assert played.status is RoundStatus.PUBLISHED
        assert cloud.statuses(run.run_id, number) == [AssignmentStatus.COUNTED] * 3
        _check_metrics(RoundMetrics.model_validate(played.metrics), devices, last=number == 2)
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED
    versions = [cloud.version(run.run_id, number) for number in (0, 1, 2)]
    assert [version.num_updates for version in versions] == [0, 3, 3]
    assert len({version.proxy_adapter_sha256 for version in versions}) == 3
    assert len({version.llm_adapter_sha256 for version in versions}) == 3
    for version in (versions[0], versions[2]):
        for part, count in (("validation", 4), ("test", 3)):
            assert {Scores.model_validate(each).num_rows for each in version.metrics[part].values()} == {count}
            assert set(version.metrics[part]) == {"llm", "proxy"}
    assert json.dumps(cloud.round(run.run_id, 2).metrics, allow_nan=False)


def _check_metrics(metrics: RoundMetrics, devices: list[str], *, last: bool) -> None:
    assert (metrics.num_updates, metrics.num_examples) == (3, 24)
    assert set(metrics.update_norms) == set(devices)
    assert min(metrics.update_norms.values()) > 0
    assert metrics.alignment is not None
    assert metrics.alignment.coverage > 0.8
    assert {"llm_ce", "proxy_ce"} <= set(metrics.losses)
    assert set(metrics.teacher_rows) == {"llm", "proxy"}
    assert set(metrics.teacher_rows["proxy"]) == set(devices)
    assert set(metrics.validation) == {"llm", "proxy"}
    assert bool(metrics.test) is last
    assert metrics.promoted
    assert set(metrics.seconds_by_stage) == {"aggregating", "co_tuning", "evaluating"}
    assert min(metrics.seconds_by_stage.values()) > 0
    assert min(metrics.peak_memory_bytes.values()) > 10 * 2**20


def test_preparation_stores_what_devices_need(cloud: Cloud, llm: str) -> None:
    (device,) = cloud.enrol("a")
    cloud.create_run(llm)
    cloud.work()
    assignment = cloud.take(device)
    assert assignment.proxy_manifest is not None
    assert assignment.adapter is not None
    proxy, probe, shared = cloud.for_device(assignment)
    assert (proxy.architecture, len(probe)) == ("llama", 4)
    assert proxy.table.fingerprint == load_language_model(llm).table.fingerprint
    with cloud.blobs.open(assignment.proxy_manifest.sha256) as file:
        manifest = ModelManifest.model_validate_json(file.read())
    assert [each.path for each in manifest.files] == sorted(each.path for each in manifest.files)
    _, metadata = read_tensors(cloud.blobs.path(assignment.adapter.sha256))
    assert metadata == {METADATA_FORMAT: ADAPTER_FORMAT, METADATA_PROXY: assignment.proxy_manifest.sha256}
    expected = cloud.read(updates.expected_tensors, assignment.round_id)
    assert expected is not None
    assert {name: info.shape for name, info in expected.items()} == {
        name: tuple(tensor.shape) for name, tensor in shared.items()
    }
    assert {info.dtype for info in expected.values()} == {"F32"}


def test_the_aggregate_is_the_weighted_mean(cloud: Cloud, llm: str) -> None:
    """Against numpy, with a server learning rate, and with a device that says it has a billion examples."""
    devices = cloud.enrol("a", "b", "c")
    strategy = {"server_learning_rate": 0.5, "max_examples": 10, "server": {"steps": 0}}
    run = cloud.create_run(llm, min_updates=3, strategy=strategy)
    cloud.work()
    weights, deltas = (1, 5, 10), []
    for seed, (device, weight) in enumerate(zip(devices, (1, 5, 10**9), strict=True)):
        assignment = cloud.take(device)
        tensors = cloud.untrained_update(assignment, seed=seed, scale=0.1)
        deltas.append(tensors[PartKind.ADAPTER_DELTA])
        cloud.deliver(assignment, device, cloud.as_parts(tensors), num_examples=weight)
    before = read_tensors(cloud.blobs.path(cloud.version(run.run_id, 0).proxy_adapter_sha256 or ""))[0]
    cloud.work()
    # Without server steps the candidate is the aggregate.
    after = read_tensors(cloud.blobs.path(cloud.version(run.run_id, 1).proxy_adapter_sha256 or ""))[0]
    for name, tensor in after.items():
        mean = np.average([delta[name].double().numpy() for delta in deltas], axis=0, weights=weights)
        expected = before[name].double().numpy() + 0.5 * mean
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert cloud.round(run.run_id).metrics["num_examples"] == 16


def test_momentum_survives_the_worker_and_starts_from_the_base_version(cloud: Cloud, llm: str) -> None:
    """Two rounds, each by a worker that has nothing in memory, against numpy; the candidate is the aggregate."""
    (device,) = cloud.enrol("a")
    optimizer = {"name": "momentum", "beta1": 0.5}
    run = cloud.create_run(llm, rounds=2, strategy={"server_optimizer": optimizer, "server": {"steps": 0}})
    cloud.work()
    deltas = []
    for seed in (0, 1):
        cloud.runner = cloud.make_runner(f"restarted-{seed}")
        assignment = cloud.take(device)
        tensors = cloud.untrained_update(assignment, seed=seed, scale=1e-4)
        deltas.append(tensors[PartKind.ADAPTER_DELTA])
        cloud.deliver(assignment, device, cloud.as_parts(tensors))
        cloud.work()
    theta = [
        read_tensors(cloud.blobs.path(cloud.version(run.run_id, number).proxy_adapter_sha256 or ""))[0]
        for number in (0, 1, 2)
    ]
    for name, first in deltas[0].items():
        steps = [first, 0.5 * first + deltas[1][name]]
        for before, after, step in zip(theta, theta[1:], steps, strict=False):
            np.testing.assert_allclose(after[name], before[name] + step, rtol=1e-6, atol=1e-9)
    contexts = [cloud.read(rounds.get_context, cloud.round(run.run_id, number).round_id) for number in (1, 2)]
    assert contexts[0].base_optimizer_sha256 is None
    state, _ = read_tensors(cloud.blobs.path(contexts[1].base_optimizer_sha256 or ""))
    np.testing.assert_allclose(state["momentum." + name], first, rtol=1e-7)


def test_exact_aggregation_in_a_run(cloud: Cloud, llm: str) -> None:
    """The new product is the mean of the devices' products, and the round says what cutting it to rank lost."""
    devices = cloud.enrol("a", "b")
    run = cloud.create_run(llm, min_updates=2, strategy={"aggregation": "exact_svd", "server": {"steps": 0}})
    cloud.work()
    deltas = []
    for seed, device in enumerate(devices):
        assignment = cloud.take(device)
        tensors = cloud.untrained_update(assignment, seed=seed, scale=1e-3)
        deltas.append(tensors[PartKind.ADAPTER_DELTA])
        cloud.deliver(assignment, device, cloud.as_parts(tensors))
    cloud.work()
    before, after = (
        read_tensors(cloud.blobs.path(cloud.version(run.run_id, number).proxy_adapter_sha256 or ""))[0]
        for number in (0, 1)
    )
    lost = whole = 0.0
    for left in (name for name in before if "lora_B" in name):
        right = left.replace("lora_B", "lora_A")
        moved = [(before[left] + each[left]).double() @ (before[right] + each[right]).double() for each in deltas]
        exact = torch.stack(moved).mean(0)
        lost += float((after[left].double() @ after[right].double() - exact).square().sum())
        whole += float(exact.square().sum())
    errors = RoundMetrics.model_validate(cloud.round(run.run_id, 1).metrics).aggregation_errors
    assert set(errors) == {"relative_error", "error_bound", "update_error"}
    assert 0 < errors["relative_error"] < 1
    assert errors["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_everything_again_gives_the_same_bytes(tmp_path: Path, cloud: Cloud, llm: str) -> None:
    """Another worker with nothing cached, another database, other device ids: equal adapters, equal scores."""
    other_home = tmp_path / "other"
    other_home.mkdir()
    (other_home / "cotune.sqlite3").write_bytes((tmp_path / "cotune.sqlite3").read_bytes())
    other = Cloud(Settings.from_environment({"COTUNE_HOME": str(other_home)}))
    results = []
    for each in (cloud, other):
        devices = each.enrol("a", "b")
        run = each.create_run(llm, min_updates=2)
        each.work()
        for seed, device in enumerate(devices):
            each.deliver_untrained(device, seed=seed)
            if each is other:
                each.runner = each.make_runner(f"restarted-{seed}")
        each.work()
        version = each.version(run.run_id, 1)
        results.append((version.proxy_adapter_sha256, version.llm_adapter_sha256, version.metrics["validation"]))
    other.database.dispose()
    assert results[0] == results[1]


def test_updates_of_different_ranks_are_averaged_as_products(cloud: Cloud, llm: str) -> None:
    """Against full matrices; one of a rank that was not assigned, past the API's admission, is refused."""
    full, low, wrong = cloud.enrol("full", "low", "wrong")
    for device in (low, wrong):
        profile = PROFILE.model_copy(update={"max_adapter_rank": 1})
        cloud.call(persisted_devices.record_heartbeat, device, Heartbeat(profile=profile), utc_now())
    strategy = {"device_ranks": "declared", "aggregation": "exact_svd", "server": {"steps": 0}}
    run = cloud.create_run(llm, min_updates=2, grace_seconds=60, strategy=strategy)
    cloud.work()
    before = read_tensors(cloud.blobs.path(cloud.version(run.run_id, 0).proxy_adapter_sha256 or ""))[0]
    moves = []
    for seed, (device, rank, weight) in enumerate(((low, 1, 5), (wrong, 2, 7), (full, 2, 3))):
        assignment = cloud.take(device)
        assert assignment.adapter_rank == (None if device == full else 1)
        tensors = cloud.untrained_update(assignment, seed=seed, scale=0.1)
        delta = tensors[PartKind.ADAPTER_DELTA]
        if rank == 1:
            delta = {name: t[:1] if "lora_A" in name else t[:, :1] for name, t in delta.items()}
        cloud.deliver(
            assignment, device, cloud.as_parts({**tensors, PartKind.ADAPTER_DELTA: delta}), num_examples=weight
        )
        if device != wrong:
            moves.append((at_rank(before, rank, seed=0), delta, rank, weight))
    cloud.work()
    played = cloud.round(run.run_id)
    assert played.status is RoundStatus.PUBLISHED
    reasons = {device.device_name: (device.reason or "").partition(":")[0] for device in played.devices}
    assert reasons == {"full": "", "low": "", "wrong": "wrong_tensor_shape"}
    metrics = RoundMetrics.model_validate(played.metrics)
    assert metrics.update_ranks == {low: 1}
    after = read_tensors(cloud.blobs.path(cloud.version(run.run_id, 1).proxy_adapter_sha256 or ""))[0]
    errors, norms = [], []
    for left, right in lora_pairs(before).items():
        exact = before[left].double() @ before[right].double() / 2
        for start, delta, rank, weight in moves:
            moved = (start[left].double() + delta[left]) @ (start[right].double() + delta[right])
            exact += weight / 8 / rank * (moved - start[left].double() @ start[right].double())
        errors.append(torch.linalg.matrix_norm(after[left].double() @ after[right].double() / 2 - exact))
        norms.append(torch.linalg.matrix_norm(exact))
    error = float(torch.stack(errors).norm() / torch.stack(norms).norm())
    # The candidate is the best cut to rank 2 of an exact sum of rank up to 4, and the round says what that lost.
    assert error == pytest.approx(metrics.aggregation_errors["relative_error"], rel=1e-3)
    assert 0 < error < 1


def test_bad_values_are_rejected_and_the_others_counted(cloud: Cloud, llm: str) -> None:
    devices = cloud.enrol("good", "not-finite", "too-large", "other-probe-set", "not-a-distribution")
    run = cloud.create_run(llm, min_updates=1, grace_seconds=60, strategy={"max_update_norm": 5.0})
    cloud.work()
    for device in devices[1:]:
        assignment = cloud.take(device)
        tensors = cloud.untrained_update(assignment)
        delta, logits = tensors[PartKind.ADAPTER_DELTA], tensors[PartKind.LOGITS]
        match devices.index(device):
            case 1:
                next(iter(delta.values()))[0, 0] = torch.nan
            case 2:
                next(iter(delta.values())).fill_(10.0)
            case 3:
                cloud.logits_metadata = {**cloud.logits_metadata, "probe_set": "0" * 64}
            case 4:
                logits["tail"][0] = torch.inf
        cloud.deliver(assignment, device, cloud.as_parts(tensors))
    cloud.deliver_untrained(devices[0])
    cloud.work()
    played = cloud.round(run.run_id)
    assert played.status is RoundStatus.PUBLISHED
    reasons = {device.device_name: (device.reason or "").partition(":")[0] for device in played.devices}
    assert reasons == {
        "good": "",
        "not-finite": "non_finite_values",
        "too-large": "norm_out_of_range",
        "other-probe-set": "logits_mismatch",
        "not-a-distribution": "logits_mismatch",
    }
    metrics = RoundMetrics.model_validate(played.metrics)
    assert metrics.num_updates == 1
    assert metrics.rejected[devices[1]] is ErrorCode.NON_FINITE_VALUES
    assert len(metrics.rejected) == 4
    refusals = [event for event in cloud.events(run.run_id) if event.type is EventType.UPDATE_REJECTED]
    assert {event.device_id for event in refusals} == set(devices[1:])


def test_too_few_usable_updates_end_the_run_and_say_why(cloud: Cloud, llm: str) -> None:
    one, other = cloud.enrol("one", "other")
    run = cloud.create_run(llm, min_updates=2)
    cloud.work()
    cloud.deliver_untrained(one)
    assignment = cloud.take(other)
    tensors = cloud.untrained_update(assignment)
    next(iter(tensors[PartKind.ADAPTER_DELTA].values())).fill_(torch.inf)
    cloud.deliver(assignment, other, cloud.as_parts(tensors))
    cloud.work()
    failed = cloud.run(run.run_id)
    assert (failed.status, failed.error_code) == (RunStatus.FAILED, ErrorCode.TOO_FEW_UPDATES)
    assert "1 usable updates of the 2" in (failed.status_reason or "")
    assert "non_finite_values" in (failed.status_reason or "")


def test_an_update_of_low_coverage_is_refused_and_ends_nothing_for_the_others(cloud: Cloud, llm: str) -> None:
    low = {"alignment": {"coverage": 0.41, "class_agreement": 0.9, "num_spans": 100, "skipped_rows": 0}}
    good, bad = cloud.enrol("a", "b")
    run = cloud.create_run(llm, grace_seconds=60)
    cloud.work()
    first, second = cloud.take(good), cloud.take(bad)
    cloud.deliver(second, bad, cloud.as_parts(cloud.untrained_update(second)), metrics=low)
    cloud.deliver(first, good, cloud.as_parts(cloud.untrained_update(first)))
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED
    assert cloud.round(run.run_id).metrics["rejected"] == {bad: "coverage_too_low"}
    assert cloud.round(run.run_id).metrics["num_updates"] == 1

    alone = cloud.create_run(llm)
    cloud.work()
    cloud.deliver_untrained(bad, metrics=low)
    cloud.work()
    failed = cloud.run(alone.run_id)
    assert (failed.status, failed.error_code) == (RunStatus.FAILED, ErrorCode.TOO_FEW_UPDATES)
    assert "coverage_too_low: expected at least 0.80" in (failed.status_reason or "")
    assert "got 0.41" in (failed.status_reason or "")


@pytest.mark.parametrize(
    ("gate", "status"), [("quarantine", "quarantined"), ("reject", "rejected"), ("off", "counted")]
)
def test_an_update_unlike_the_others_is_held_back_with_a_reason_both_can_read(
    cloud: Cloud, llm: str, gate: str, status: str
) -> None:
    devices = cloud.enrol("a", "b", "c", "d", "e")
    strategy = {"norm_gate": gate, "norm_gate_min_updates": 5, "server": {"steps": 0}, "max_update_norm": 1e6}
    run = cloud.create_run(llm, strategy=strategy, min_updates=4, grace_seconds=60)
    cloud.work()
    assignments = [cloud.take(device) for device in devices]
    for number, (device, assignment) in enumerate(zip(devices, assignments, strict=True)):
        update = cloud.untrained_update(assignment, seed=number, scale=1.0 if number == 2 else 1e-3)
        cloud.deliver(assignment, device, cloud.as_parts(update))
    cloud.work()
    shown = {each.device_id: each for each in cloud.round(run.run_id).devices}
    assert [shown[device].status.value for device in devices] == ["counted", "counted", status, "counted", "counted"]
    metrics = cloud.round(run.run_id).metrics
    if gate == "off":
        assert metrics["num_updates"] == 5
        return
    assert metrics["num_updates"] == 4
    assert metrics[status] == {devices[2]: "norm_outlier"}
    assert "norm_outlier: expected a norm within" in (shown[devices[2]].reason or "")
    outcome = cloud.read(updates.outcome, devices[2], assignments[2].assignment_id)
    assert (outcome.status.value, outcome.reason) == (status, shown[devices[2]].reason)
    assert outcome.receipt is not None
    (event,) = [each for each in cloud.events(run.run_id) if each.type == f"update.{status}"]
    assert event.data["code"] == "norm_outlier"
    counted = cloud.read(updates.submitted_updates, cloud.round(run.run_id).round_id)
    assert {update.device_id for update in counted} == set(devices) - {devices[2]}


def test_a_version_that_is_worse_is_kept_and_not_promoted(cloud: Cloud, llm: str) -> None:
    (device,) = cloud.enrol("a")
    evaluation = {"validation_rows": 4, "test_rows": 0, "max_new_tokens": 4, "tolerance_bits_per_byte": 0.005}
    run = cloud.create_run(
        llm, rounds=2, evaluation=evaluation, strategy={"server": {"steps": 0}, "max_update_norm": 1e6}
    )
    cloud.work()
    assignment = cloud.take(device)
    # Noise in place of an adapter undoes what distillation gained: about 0.025 bits a byte.
    cloud.deliver(assignment, device, cloud.as_parts(cloud.untrained_update(assignment, scale=10.0)))
    cloud.work()
    assert not cloud.version(run.run_id, 1).promoted
    played = cloud.round(run.run_id)
    assert played.status is RoundStatus.PUBLISHED
    assert played.status_reason == "version 1 is kept and not promoted"
    assert cloud.round(run.run_id, 2).base_version == 0
    assert cloud.take(device).adapter == assignment.adapter


def test_tolerance_is_bits_a_byte_of_each_model() -> None:
    base = {name: Scores(rouge_l=1, exact_match=1, bits_per_byte=2.0, num_rows=4) for name in ("llm", "proxy")}
    worse = {**base, "proxy": base["proxy"].model_copy(update={"bits_per_byte": 2.1, "rouge_l": 99})}
    assert not_worse(base, base, 0)
    assert not not_worse(worse, base, 0.05)
    assert not_worse(worse, base, 0.2)


def test_standalone_needs_no_model_here(cloud: Cloud) -> None:
    devices = cloud.enrol("a", "b")
    run = cloud.create_run(None, min_updates=2, strategy={"name": "standalone"}, public_data=None)
    cloud.work()
    for device in devices:
        assignment = cloud.take(device)
        assert assignment.uploads == []
        cloud.deliver(assignment, device, {}, metrics={"alignment": None})
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED
    assert cloud.statuses(run.run_id) == [AssignmentStatus.COUNTED] * 2
    version = cloud.version(run.run_id, 1)
    assert (version.promoted, version.proxy_adapter_sha256, version.num_updates) == (True, None, 2)


def test_a_proxy_of_ones_own(cloud: Cloud, llm: str) -> None:
    run = cloud.create_run(llm, proxy={"source": "pretrained", "path": llm, "steps": 0})
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.RUNNING
    scores = cloud.version(run.run_id, 0).metrics["validation"]
    assert scores["llm"] == scores["proxy"]


EVERY_MODE = {
    "layers": 2,
    "neuron_share": 0.5,
    "steps": 6,
    "batch_size": 4,
    "max_length": 64,
    "feature_weight": 1.0,
    "relation_weight": 1.0,
    "on_policy_fraction": 0.5,
    "on_policy_tokens": 4,
    "gradient_checkpointing": True,
    "checkpoint_steps": 2,
}


def test_every_mode_of_distillation_reaches_the_proxy(cloud: Cloud, llm: str) -> None:
    (device,) = cloud.enrol("a")
    run = cloud.create_run(llm, proxy=EVERY_MODE)
    cloud.work()
    distilled = cloud.version(run.run_id, 0).metrics["distillation"]
    assert {"kl_before", "kl_after", "top1_before", "top1_after", "feature", "relation"} <= distilled.keys()
    proxy, _, _ = cloud.for_device(cloud.take(device))
    assert (proxy.base.config.num_hidden_layers, proxy.base.config.intermediate_size) == (2, 16)


def test_a_killed_distillation_is_taken_up_where_it_was(cloud: Cloud, llm: str) -> None:
    class Dying(Lease):
        def on_progress(self, stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
            if stage == "distillation":
                steps_taken.append(step)
                if step == 5:
                    raise Abandoned("killed")

    steps_taken: list[int] = []
    (device,) = cloud.enrol("a")
    whole = cloud.create_run(llm, proxy=EVERY_MODE)
    cloud.work()
    whole_proxy = cloud.take(device).proxy_manifest
    cloud.call(runs.stop_run, whole.run_id, "enough", utc_now())
    run = cloud.create_run(llm, proxy=EVERY_MODE)
    (job_id,) = cloud.sent
    job = cloud.call(jobs.claim, job_id, "killed", 0.001, utc_now())
    assert job is not None
    folder = cloud.settings.home / "checkpoints"
    with Dying(lambda: True, 60, threading.Event()) as lease:
        cache = ModelCache(cloud.settings.home, cloud.blobs)
        work = Work(job, "killed", cloud.database, cloud.blobs, cache, lease, folder)
        with pytest.raises(Abandoned):
            prepare(work)
    assert (folder / run.run_id / "preparation" / "distillation.safetensors").exists()
    time.sleep(0.01)
    with capture_logs() as logs:
        cloud.work()
    first = next(entry for entry in logs if entry.get("stage") == "distillation")
    assert (steps_taken, first["step"]) == ([1, 2, 3, 4, 5], 5)  # the state after step 4 was the last one kept
    assert cloud.take(device).proxy_manifest == whole_proxy
    assert not (folder / run.run_id).exists()


def test_states_of_runs_that_ended_are_removed(cloud: Cloud, llm: str) -> None:
    folder = cloud.settings.home / "checkpoints"
    run = cloud.create_run(llm)
    cloud.call(runs.stop_run, run.run_id, "enough", utc_now())
    for name in (run.run_id, "run_of_another_database"):
        (folder / name).mkdir(parents=True)
    cloud.create_run(llm)
    cloud.work()
    assert list(folder.iterdir()) == []


KEPT = {"server": {"steps": 6, "batch_size": 4, "max_length": 64, "checkpoint_steps": 2}}
"""The co-tuning's states: after steps 2, 4 and 6."""


class DiesAtTheFifthStep(Lease):
    """As a worker that is killed: nothing is written, nothing given back."""

    def on_progress(self, stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
        if step == 5:
            raise Abandoned("killed")


def co_tune_until_killed(cloud: Cloud, llm: str) -> Run:
    """A run whose first round lost its worker in co-tuning; the job waits for another."""
    (device,) = cloud.enrol("a")
    run = cloud.create_run(llm, strategy=KEPT)
    cloud.work()
    cloud.deliver_untrained(device)
    cloud.runner.run(cloud.sent.pop(0))
    (job_id,) = cloud.sent
    job = cloud.call(jobs.claim, job_id, "killed", 0.001, utc_now())
    assert job is not None
    with DiesAtTheFifthStep(lambda: True, 60, threading.Event()) as lease:
        cache = ModelCache(cloud.settings.home, cloud.blobs)
        work = Work(job, "killed", cloud.database, cloud.blobs, cache, lease, cloud.settings.home / "checkpoints")
        with pytest.raises(Abandoned):
            co_tune(work)
    time.sleep(0.01)
    return run


def test_a_killed_co_tuning_is_taken_up_where_it_was_to_the_same_bits(cloud: Cloud, llm: str) -> None:
    killed = co_tune_until_killed(cloud, llm)
    folder = cloud.settings.home / "checkpoints" / killed.run_id
    assert [path.name for path in (folder / "round-1").iterdir()] == ["server_mutual_learning.safetensors"]
    with capture_logs() as logs:
        cloud.work()
    assert next(entry for entry in logs if entry.get("stage") == "server_mutual_learning")["step"] == 5
    assert not [entry for entry in logs if entry["event"] == "checkpoint_ignored"]
    assert not folder.exists()
    (device,) = cloud.enrol("b")
    whole = cloud.create_run(llm, strategy=KEPT)
    cloud.work()
    cloud.deliver_untrained(device)
    cloud.work()
    expected, got = (cloud.version(run.run_id, 1) for run in (whole, killed))
    assert got.proxy_adapter_sha256 == expected.proxy_adapter_sha256
    assert got.llm_adapter_sha256 == expected.llm_adapter_sha256
    losses = [cloud.round(run.run_id).metrics["losses"] for run in (whole, killed)]
    assert losses[0] == losses[1]


def test_a_state_of_other_inputs_is_not_used(cloud: Cloud, llm: str) -> None:
    """Here another seed; any other input is part of the same hash."""
    run = co_tune_until_killed(cloud, llm)
    config = run.config.model_copy(update={"seed": run.config.seed + 1})
    with cloud.database.transaction() as session:
        session.execute(update(RunRow).where(RunRow.id == run.run_id).values(config=config.model_dump(mode="json")))
    with capture_logs() as logs:
        cloud.work()
    assert next(entry for entry in logs if entry.get("stage") == "server_mutual_learning")["step"] == 1
    assert len([entry for entry in logs if entry["event"] == "checkpoint_ignored"]) == 1
    assert cloud.round(run.run_id).status is RoundStatus.PUBLISHED


def test_states_of_a_round_that_is_over_are_removed(cloud: Cloud, llm: str) -> None:
    run = co_tune_until_killed(cloud, llm)
    folder = cloud.settings.home / "checkpoints" / run.run_id
    (folder / "round-0").mkdir()
    (folder / "preparation").mkdir()
    cloud.create_run(llm)
    cloud.runner.run(cloud.sent.pop())  # another run's preparation, on the same machine
    assert [path.name for path in folder.iterdir()] == ["round-1"]
    cloud.call(runs.stop_run, run.run_id, "enough", utc_now())
    cloud.create_run(llm)
    cloud.runner.run(cloud.sent.pop())
    assert not folder.exists()


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(cloud: Cloud, llm: str) -> None:
    many = {"layers": 1, "steps": 2, "batch_size": 4_000_000, "max_length": 64}
    run = cloud.create_run(llm, proxy=many)
    cloud.work()
    failed = cloud.run(run.run_id)
    assert (failed.status, failed.error_code) == (RunStatus.FAILED, ErrorCode.NOT_ENOUGH_MEMORY)
    assert "distillation: not enough memory on cpu: expected to need" in (failed.status_reason or "")


def test_the_servers_own_training_is_weighed_too(cloud: Cloud, llm: str) -> None:
    server = {"server": {"steps": 2, "batch_size": 4096, "max_length": 64}}
    config = cloud.create_run(llm, strategy=server).config
    assert isinstance(config.strategy, CoPlmsSettings)
    rows = tiny_examples(8)
    with pytest.raises(DomainError, match="mutual learning: not enough memory on cuda:0") as caught:
        check_memory(config, rows, {"cuda:0": 50_000_000})
    assert (caught.value.code, caught.value.received) == (ErrorCode.NOT_ENOUGH_MEMORY, 50_000_000)
    assert caught.value.expected > 100_000_000
    check_memory(config, rows, {"cuda:0": 2**40})
    server_in_parts = config.strategy.server.model_copy(update={"micro_batch_size": 4})
    in_parts = config.strategy.model_copy(update={"server": server_in_parts})
    check_memory(config.model_copy(update={"strategy": in_parts}), rows, {"cuda:0": 50_000_000})
    careless = config.model_copy(update={"llm_loading": ModelLoading(check_memory=False)})
    check_memory(careless, rows, {"cuda:0": 1})


def test_four_bits_without_the_package_for_them_are_refused(cloud: Cloud, llm: str) -> None:
    if is_bitsandbytes_available():
        pytest.skip("bitsandbytes is installed here")
    run = cloud.create_run(llm, llm_loading={"four_bit": True})
    cloud.work()
    failed = cloud.run(run.run_id)
    assert (failed.status, failed.error_code) == (RunStatus.FAILED, ErrorCode.INVALID_FIELD)
    assert "expected the package bitsandbytes" in (failed.status_reason or "")


def test_an_llm_in_bfloat16_goes_through_a_whole_round(cloud: Cloud, llm: str) -> None:
    (device,) = cloud.enrol("a")
    run = cloud.create_run(llm, llm_loading={"dtype": "bfloat16", "devices": "auto"})
    cloud.work()
    cloud.deliver_untrained(device)
    cloud.work()
    done = cloud.run(run.run_id)
    assert done.status is RunStatus.COMPLETED, done.status_reason


def test_what_the_preparation_cannot_use(cloud: Cloud, llm: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(Path(write_rows(tmp_path / "rows.jsonl", tiny_examples(24))).read_bytes() + b"{oops\n")
    small = write_rows(tmp_path / "small.jsonl", tiny_examples(8))
    cases: dict[ErrorCode, tuple[dict[str, Any], str]] = {
        ErrorCode.MODEL_FOLDER_MISSING: ({"llm": "/no/such/folder"}, "/no/such/folder"),
        ErrorCode.DATA_FILE_INVALID: ({"public_data": str(broken)}, f"{broken}:25"),
        ErrorCode.INVALID_FIELD: ({"proxy": {"layers": 9, "steps": 0}}, "proxy"),
    }
    for code, (values, named) in cases.items():
        run = cloud.create_run(**{"llm": llm, **values})
        cloud.work()
        failed = cloud.run(run.run_id)
        assert (failed.status, failed.error_code) == (RunStatus.FAILED, code)
        assert named in (failed.status_reason or "")
    for field, path in (
        ("public_data", small),
        ("public_data", "/no/rows.jsonl"),
        ("evaluation_data", "/no/rows.jsonl"),
    ):
        run = cloud.create_run(llm, strategy=None, **{field: path})
        cloud.work()
        assert cloud.run(run.run_id).error_code is ErrorCode.DATA_FILE_INVALID


def test_a_second_delivery_of_any_job_finds_nothing_to_do(cloud: Cloud, llm: str) -> None:
    (device,) = cloud.enrol("a")
    run = cloud.create_run(llm)
    done: list[str] = []
    for _ in range(2):
        while cloud.sent:
            done.append(cloud.sent.pop(0))
            cloud.runner.run(done[-1])
            cloud.make_runner("another").run(done[-1])
        if cloud.run(run.run_id).status is RunStatus.RUNNING:
            cloud.deliver_untrained(device)
    assert len(done) == 4
    before = len(cloud.events(run.run_id))
    for job_id in done:
        cloud.runner.run(job_id)
    assert len(cloud.events(run.run_id)) == before
    assert cloud.version(run.run_id, 1).num_updates == 1


def test_a_fault_is_tried_again_and_then_ends_the_run(cloud: Cloud, llm: str) -> None:
    (device,) = cloud.enrol("a")
    run = cloud.create_run(llm)
    cloud.work()
    cloud.deliver_untrained(device)
    aggregate = cloud.blobs.path(cloud.version(run.run_id, 0).proxy_adapter_sha256 or "")
    content = aggregate.read_bytes()
    aggregate.write_bytes(content[:100])  # a fault of the disk: nobody's bad input
    (job_id,) = cloud.sent
    cloud.runner.run(job_id)
    assert cloud.run(run.run_id).status is RunStatus.RUNNING
    for _ in range(jobs.MAX_ATTEMPTS - 1):
        cloud.runner.run(job_id)
    failed = cloud.run(run.run_id)
    assert (failed.status, failed.error_code) == (RunStatus.FAILED, ErrorCode.JOB_FAILED)
    assert "aggregate_round: TensorFileError" in (failed.status_reason or "")


def test_a_file_that_the_store_lost_is_not_the_devices_fault(cloud: Cloud, llm: str) -> None:
    (device,) = cloud.enrol("a")
    run = cloud.create_run(llm)
    cloud.work()
    assignment = cloud.deliver_untrained(device)
    (update,) = cloud.read(updates.submitted_updates, assignment.round_id)
    cloud.blobs.path(update.parts[PartKind.ADAPTER_DELTA]).unlink()
    cloud.work()
    assert cloud.run(run.run_id).error_code is ErrorCode.ARTIFACT_NOT_FOUND
    (told,) = cloud.round(run.run_id).devices
    assert (told.reason or "").startswith("the run ended")


def test_a_worker_that_stops_gives_the_job_back(cloud: Cloud, llm: str) -> None:
    run = cloud.create_run(llm, proxy=ENDLESS)
    (job_id,) = cloud.sent
    timer = threading.Timer(3, cloud.runner.stop.set)
    timer.start()
    cloud.runner.run(job_id)
    timer.join()
    assert cloud.run(run.run_id).status is RunStatus.PREPARING
    other = cloud.call(jobs.claim, job_id, "worker-2", 20, utc_now())
    assert other is not None
    assert other.attempts == 1  # being asked to stop is no failure


def test_a_worker_that_stops_while_it_evaluates_gives_the_job_back_within_a_token(cloud: Cloud, llm: str) -> None:
    class StopsAtTheThirdToken(Lease):
        def on_progress(self, stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
            told.append((stage, steps))
            if len(told) == 3:
                stop.set()
            super().on_progress(stage, step, steps, losses)

    told: list[tuple[str, int]] = []
    stop = threading.Event()
    lm = load_language_model(llm)
    config = cloud.create_run(llm).config
    with StopsAtTheThirdToken(lambda: True, 60, stop) as lease, pytest.raises(Abandoned):
        score({"llm": lm, "proxy": lm}, tiny_examples(4), config, lease)
    assert told == [("evaluation_llm", 8)] * 3


def test_stopping_a_run_ends_the_work_on_it(cloud: Cloud, llm: str) -> None:
    cloud.settings = dataclasses.replace(cloud.settings, lease_seconds=0.4)
    run = cloud.create_run(llm, proxy=ENDLESS)
    (job_id,) = cloud.sent
    timer = threading.Timer(2, lambda: cloud.call(runs.stop_run, run.run_id, "enough", utc_now()))
    timer.start()
    cloud.make_runner("short-leases").run(job_id)
    timer.join()
    stopped = cloud.run(run.run_id)
    assert (stopped.status, stopped.status_reason) == (RunStatus.STOPPED, "enough")


def test_a_result_comes_too_late_when_another_worker_has_the_job(cloud: Cloud, llm: str) -> None:
    """The first worker's lease runs out unnoticed; the second one does the job; only its result counts."""
    run = cloud.create_run(llm)
    (job_id,) = cloud.sent
    job = cloud.call(jobs.claim, job_id, "stalled", 0.001, utc_now())
    assert job is not None
    with Lease(lambda: True, 60, threading.Event()) as lease:
        work = Work(job, "stalled", cloud.database, cloud.blobs, ModelCache(cloud.settings.home, cloud.blobs), lease)
        finish = prepare(work)
        time.sleep(0.01)
        cloud.work()
        assert cloud.run(run.run_id).status is RunStatus.RUNNING
        with pytest.raises(LeaseLost):
            cloud.call(finish)
    assert cloud.run(run.run_id).current_round == 1
