"""Runs whose shared adapter is one of the devices' own small model: fed_lora and fedcollm through all stages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from assets.models import load_language_model, save_language_model
from assets.tensors import tensors_to_bytes
from cotuning.model_fingerprint import fingerprint_model
from cotuning.strategies.interface import DeviceInputs, ServerInputs
from cotuning.strategies.registry import steps_of
from cotuning.strategies.results import DeviceResult
from persistence import artifacts
from protocol.assignments import Assignment, ModelManifest
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import AssignmentStatus, PartKind, RunStatus
from tests.tiny_models import tiny_examples, tiny_language_model
from tests.worker.cloud import LORA, Cloud, write_rows
from worker.adapter_files import get_adapter
from worker.memory_check import check_memory
from worker.row_files import RowFiles, get_rows

TRAINING = {"steps": 2, "batch_size": 4, "max_length": 64}
FED_LORA: dict[str, Any] = {"name": "fed_lora", "slm_lora": LORA, "training": TRAINING}
FEDCOLLM: dict[str, Any] = {
    "name": "fedcollm",
    "slm_lora": LORA,
    "llm_lora": LORA,
    "training": TRAINING,
    "server": {"steps": 3, "batch_size": 4, "max_length": 64},
}
METRICS = {"alignment": None}


@pytest.fixture(scope="module")
def slm(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "slm"
    save_language_model(tiny_language_model("qwen2"), folder)
    return str(folder)


def device_part(cloud: Cloud, assignment: Assignment, *, start: int) -> DeviceResult:
    assert assignment.adapter is not None
    given = DeviceInputs(
        slm=tiny_language_model("qwen2"),
        private=tiny_examples(8, start=start, kind="sum"),
        slm_adapter=None,
        shared_adapter=get_adapter(cloud.blobs, assignment.adapter.sha256),
        round_number=assignment.round_number,
        seed=assignment.seed,
        on_progress=lambda *_: None,
    )
    return steps_of(assignment.strategy).device_step(given)


def deliver_trained(cloud: Cloud, device_id: str, *, start: int, num_examples: int = 8) -> dict[str, Tensor]:
    assignment = cloud.take(device_id)
    result = device_part(cloud, assignment, start=start)
    parts = {PartKind.ADAPTER_DELTA: tensors_to_bytes(result.delta, {})}
    cloud.deliver(assignment, device_id, parts, num_examples=num_examples, metrics=METRICS)
    return result.delta


def test_a_round_averages_the_devices_adapters(cloud: Cloud, slm: str) -> None:
    run = cloud.create_run(None, strategy=FED_LORA, slm=slm, public_data=None, min_updates=2)
    cloud.work()
    first, second = cloud.enrol("one", "two")
    deltas = [
        deliver_trained(cloud, first, start=0, num_examples=6),
        deliver_trained(cloud, second, start=50, num_examples=2),
    ]
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED, cloud.run(run.run_id).status_reason
    assert cloud.statuses(run.run_id) == [AssignmentStatus.COUNTED] * 2
    before, after = (cloud.version(run.run_id, number).proxy_adapter_sha256 for number in (0, 1))
    assert before is not None
    assert after is not None
    theta, published = get_adapter(cloud.blobs, before), get_adapter(cloud.blobs, after)
    for name, tensor in published.items():
        expected = theta[name] + (0.75 * deltas[0][name] + 0.25 * deltas[1][name])
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)
    assert any(bool(tensor.any()) for tensor in deltas[0].values())
    assert cloud.version(run.run_id, 1).llm_adapter_sha256 is None
    metrics = cloud.round(run.run_id).metrics
    assert (metrics["num_updates"], metrics["promoted"]) == (2, True)
    assert "validation" not in metrics or metrics["validation"] == {}


def test_a_device_is_told_what_model_it_must_have_and_gets_no_other_file(cloud: Cloud, slm: str) -> None:
    run = cloud.create_run(None, strategy=FED_LORA, slm=slm, public_data=None)
    cloud.work()
    device = cloud.enrol("one")[0]
    assignment = cloud.take(device)
    assert assignment.probe_set is None
    assert assignment.uploads == [PartKind.ADAPTER_DELTA]
    assert assignment.proxy_manifest is not None
    with cloud.blobs.open(assignment.proxy_manifest.sha256) as file:
        manifest = ModelManifest.model_validate_json(file.read())
    assert manifest.fingerprint is not None
    expected = fingerprint_model(tiny_language_model("qwen2"))
    assert (manifest.fingerprint.weights, manifest.fingerprint.tokenizer) == (expected.weights, expected.tokenizer)
    # What it has already it may not fetch: only the adapter and the manifest are for devices.
    found = cloud.read(artifacts.get_for_device, assignment.proxy_manifest.sha256, device)
    assert (found.kind, found.run_id) == ("model_manifest", run.run_id)
    weights = next(each for each in manifest.files if each.path.endswith(".safetensors"))
    with pytest.raises(DomainError) as refused:
        cloud.read(artifacts.get_for_device, weights.sha256, device)
    assert refused.value.code is ErrorCode.ARTIFACT_NOT_FOUND


def test_with_public_rows_the_shared_model_is_measured(cloud: Cloud, slm: str, tmp_path: Path) -> None:
    tests = write_rows(tmp_path / "test.jsonl", tiny_examples(5, start=300))
    run = cloud.create_run(None, strategy=FED_LORA, slm=slm, evaluation_data=tests)
    cloud.work()
    deliver_trained(cloud, cloud.enrol("one")[0], start=0)
    cloud.work()
    assert cloud.run(run.run_id).status is RunStatus.COMPLETED, cloud.run(run.run_id).status_reason
    versions = [cloud.version(run.run_id, number) for number in (0, 1)]
    assert [set(version.metrics["validation"]) for version in versions] == [{"proxy"}] * 2
    assert [set(version.metrics["test"]) for version in versions] == [{"proxy"}] * 2
    bits = [version.metrics["validation"]["proxy"]["bits_per_byte"] for version in versions]
    assert bits[0] != bits[1]
    assert set(versions[0].metrics["models"]) == {"proxy"}


def test_a_small_model_that_is_not_there_fails_the_run_with_its_name(cloud: Cloud, tmp_path: Path) -> None:
    run = cloud.create_run(None, strategy=FED_LORA, slm=str(tmp_path / "none"), public_data=None)
    cloud.work()
    failed = cloud.run(run.run_id)
    assert (failed.status, failed.error_code) == (RunStatus.FAILED, ErrorCode.MODEL_FOLDER_MISSING)
    assert str(tmp_path / "none") in (failed.status_reason or "")


def test_an_update_of_another_shape_is_refused(cloud: Cloud, slm: str) -> None:
    run = cloud.create_run(None, strategy=FED_LORA, slm=slm, public_data=None)
    cloud.work()
    device = cloud.enrol("one")[0]
    assignment = cloud.take(device)
    delta = device_part(cloud, assignment, start=0).delta
    name = next(iter(delta))
    broken = delta | {name: delta[name][:1].clone()}
    cloud.deliver(assignment, device, {PartKind.ADAPTER_DELTA: tensors_to_bytes(broken, {})}, metrics=METRICS)
    cloud.work()
    failed = cloud.run(run.run_id)
    assert (failed.status, failed.error_code) == (RunStatus.FAILED, ErrorCode.TOO_FEW_UPDATES)
    assert "wrong_tensor_shape" in (failed.status_reason or "")


def test_fedcollm_sends_the_distilled_adapter_to_the_devices(cloud: Cloud, slm: str, llm: str) -> None:
    """And what the worker makes has the bits that the strategy gives to whoever simulates the round."""
    run = cloud.create_run(llm, strategy=FEDCOLLM, slm=slm, rounds=2, min_updates=2)
    cloud.work()
    devices = cloud.enrol("one", "two")
    assignments = [cloud.take(device) for device in devices]
    steps = steps_of(assignments[0].strategy)
    assert assignments[0].adapter is not None
    theta = get_adapter(cloud.blobs, assignments[0].adapter.sha256)
    aggregator = steps.aggregator(theta, None)
    for place, (device, assignment) in enumerate(sorted(zip(devices, assignments, strict=True))):
        result = device_part(cloud, assignment, start=50 * place)
        parts = {PartKind.ADAPTER_DELTA: tensors_to_bytes(result.delta, {})}
        cloud.deliver(assignment, device, parts, num_examples=result.num_examples, metrics=METRICS)
        aggregator.add(result.delta, result.num_examples)
    cloud.work()

    versions = [cloud.version(run.run_id, number) for number in (0, 1)]
    rows = RowFiles.of(versions[0])
    assert rows is not None
    assert versions[0].llm_adapter_sha256 is not None
    served = steps.server_step(
        ServerInputs(
            round_number=1,
            seed=7,
            on_progress=lambda *_: None,
            llm=load_language_model(llm),
            shared_model=load_language_model(slm),
            shared_adapter=aggregator.result().adapter,
            llm_adapter=get_adapter(cloud.blobs, versions[0].llm_adapter_sha256),
            public=get_rows(cloud.blobs, rows.training),
        )
    )
    next_assignment = cloud.take(devices[0])
    assert next_assignment.round_number == 2
    assert next_assignment.adapter is not None
    assert next_assignment.adapter.sha256 == versions[1].proxy_adapter_sha256
    for sha256, expected in (
        (versions[1].proxy_adapter_sha256, served.shared_adapter),
        (versions[1].llm_adapter_sha256, served.llm_adapter),
    ):
        assert sha256 is not None
        assert expected is not None
        stored = get_adapter(cloud.blobs, sha256)
        assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    average = aggregator.result().adapter
    assert any(not torch.equal(average[name], tensor) for name, tensor in (served.shared_adapter or {}).items())
    metrics = cloud.round(run.run_id).metrics
    assert set(metrics["losses"]) == {"llm_ce", "llm_kl", "slm_ce", "slm_kl"}
    assert set(versions[1].metrics["validation"]) == {"llm", "proxy"}


def test_the_auxiliary_set_stays_on_the_server(cloud: Cloud, slm: str, llm: str) -> None:
    cloud.create_run(llm, strategy=FEDCOLLM, slm=slm)
    cloud.work()
    device = cloud.enrol("one")[0]
    assignment = cloud.take(device)
    assert assignment.probe_set is None
    rows = RowFiles.of(cloud.version(assignment.run_id, 0))
    assert rows is not None
    assert len(get_rows(cloud.blobs, rows.training)) == 24 - 4  # none is kept for a probe set
    with pytest.raises(DomainError) as refused:
        cloud.read(artifacts.get_for_device, rows.training, device)
    assert refused.value.code is ErrorCode.ARTIFACT_NOT_FOUND


def test_its_memory_is_weighed_before_anything_is_loaded(cloud: Cloud, slm: str, llm: str) -> None:
    strategy = FEDCOLLM | {"server": {"steps": 3, "batch_size": 4096, "max_length": 64}}
    config = cloud.create_run(llm, strategy=strategy, slm=slm).config
    with pytest.raises(DomainError, match="mutual learning: not enough memory on cuda:0"):
        check_memory(config, tiny_examples(8), {"cuda:0": 50_000_000})
    check_memory(config, tiny_examples(8), {"cuda:0": 2**40})
