"""Strategies that average adapters of the devices' own model: a device with another one says so before it trains."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from assets.models import load_language_model
from assets.tensors import read_tensors, tensors_to_bytes
from cotuning.adapters import fresh_adapter, lora_config
from cotuning.model_fingerprint import fingerprint_model
from edge_agent import cycle
from edge_agent.cycle import Agent, Outcome, RoundFiles, TrainedUpdate
from edge_agent.errors import CannotTrain
from edge_agent.training import LocalTrainer
from protocol.assignments import Assignment, AssignmentRefusal, ModelFingerprint, ModelManifest
from protocol.headers import METADATA_BASE, METADATA_PROXY
from protocol.statuses import PartKind
from protocol.strategies import CentralizedSettings, FedLoraSettings, LocalTraining
from tests.edge_agent.conftest import make_assignment
from tests.edge_agent.fake_cloud import FakeCloud
from tests.edge_agent.tiny_world import LORA, TinyWorld, build_world

FED_LORA = FedLoraSettings(slm_lora=LORA, training=LocalTraining(steps=3, batch_size=4, max_length=96))
UPLOADS: dict[str, Any] = {"uploads": [PartKind.ADAPTER_DELTA], "upload_limits": {}, "probe_set": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def files(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> RoundFiles:
    """What a round of this device's own model brings."""
    slm = load_language_model(world.config.model.path)
    theta = fresh_adapter(slm, lora_config(slm, **LORA.model_dump()), seed=1)
    adapter = tmp_path_factory.mktemp("round") / "adapter"
    adapter.write_bytes(tensors_to_bytes(theta, {}))
    expected = ModelFingerprint(**asdict(fingerprint_model(slm)))
    return RoundFiles(None, adapter, None, expected_slm=expected)


def assign(cloud: FakeCloud, files: RoundFiles) -> Assignment:
    manifest = ModelManifest(files=[], fingerprint=files.expected_slm).model_dump_json().encode()
    assert files.adapter is not None
    adapter = cloud.add_artifact(files.adapter.read_bytes())
    return make_assignment(
        cloud, strategy=FED_LORA, proxy_manifest=cloud.add_artifact(manifest), adapter=adapter, **UPLOADS
    )


def train(world: TinyWorld, cloud: FakeCloud, files: RoundFiles) -> TrainedUpdate:
    return LocalTrainer(world.config).train(assign(cloud, files), files, None, lambda *_: None)


def test_the_delta_of_its_own_models_adapter_is_all_that_leaves(
    world: TinyWorld, cloud: FakeCloud, files: RoundFiles, tmp_path: Path
) -> None:
    update = train(world, cloud, files)
    assert set(update.parts) == {PartKind.ADAPTER_DELTA}
    (tmp_path / "delta").write_bytes(update.parts[PartKind.ADAPTER_DELTA])
    delta, header = read_tensors(tmp_path / "delta")
    assert files.adapter is not None
    theta = read_tensors(files.adapter)[0]
    assert {name: tensor.shape for name, tensor in delta.items()} == {
        name: tensor.shape for name, tensor in theta.items()
    }
    assignment = cloud.assignments[-1]
    assert assignment.adapter is not None
    assert assignment.proxy_manifest is not None
    assert header[METADATA_BASE] == assignment.adapter.sha256
    assert header[METADATA_PROXY] == assignment.proxy_manifest.sha256
    assert set(update.metrics.losses) == {"slm_ce"}


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        ({"weights": "ab" * 32}, "other_model", "expected weights abababababab, those of slm are "),
        ({"tokenizer": "cd" * 32}, "other_tokenizer", "expected tokenizer cdcdcdcdcdcd, those of slm are "),
        ({"weights": "ab" * 32, "tokenizer": "cd" * 32}, "other_tokenizer", "expected tokenizer"),
    ],
)
def test_a_device_with_another_model_refuses_before_it_trains(
    world: TinyWorld, cloud: FakeCloud, files: RoundFiles, changes: dict[str, str], code: str, expected: str
) -> None:
    assert files.expected_slm is not None
    other = replace(files, expected_slm=files.expected_slm.model_copy(update=changes))
    stages: list[str] = []
    assignment = assign(cloud, other).model_copy(update={"evaluate_before": False})
    with pytest.raises(CannotTrain, match=expected) as caught:
        LocalTrainer(world.config).train(assignment, other, None, lambda stage, *_: stages.append(stage))
    assert caught.value.code == code
    assert stages == []


def test_a_manifest_without_a_fingerprint_is_an_incomplete_assignment(
    world: TinyWorld, cloud: FakeCloud, files: RoundFiles
) -> None:
    with pytest.raises(CannotTrain, match="expected a fingerprint of the run's small model") as caught:
        train(world, cloud, replace(files, expected_slm=None))
    assert caught.value.code == "incomplete_assignment"


def test_the_cycle_fetches_the_manifest_and_the_adapter_and_no_weights(
    agent: Agent, cloud: FakeCloud, files: RoundFiles
) -> None:
    assignment = assign(cloud, files)
    fetched = cycle.fetch(agent, assignment)
    assert fetched.expected_slm == files.expected_slm
    assert (fetched.proxy_folder, fetched.probe_set) == (None, None)
    assert fetched.adapter is not None
    assert len(cloud.requests("/v1/artifacts/")) == 2


def test_an_assignment_without_its_files_is_refused_by_name(agent: Agent, cloud: FakeCloud, files: RoundFiles) -> None:
    cloud.assignments.append(assign(cloud, files).model_copy(update={"proxy_manifest": None, "adapter": None}))
    cloud.assignments.pop(-2)
    assert cycle.run_once(agent) is Outcome.REFUSED
    refusal = AssignmentRefusal.model_validate(json.loads(cloud.requests("/refusal")[-1].body))
    assert refusal.code == "incomplete_assignment"
    assert refusal.reason == "expected the assignment to name adapter, model_manifest"


def test_a_device_takes_no_part_in_what_pools_private_rows(agent: Agent, cloud: FakeCloud) -> None:
    nothing: dict[str, Any] = {"proxy_manifest": None, "adapter": None, "probe_set": None, "uploads": []}
    make_assignment(cloud, strategy=CentralizedSettings(), **nothing)
    assert cycle.run_once(agent) is Outcome.REFUSED
    refusal = AssignmentRefusal.model_validate(json.loads(cloud.requests("/refusal")[-1].body))
    assert refusal.code == "not_deployable"
