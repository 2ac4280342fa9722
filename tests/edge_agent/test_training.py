"""Local training with real, tiny models: repeatable to the bit, and honest about what it cannot do."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from structlog.testing import capture_logs

from assets.models import load_language_model
from assets.tensors import read_tensors
from edge_agent.cycle import TrainedUpdate
from edge_agent.errors import CannotTrain, Stopped
from edge_agent.local_state import LocalState, LocalStates
from edge_agent.training import LocalTrainer
from protocol.assignments import Assignment
from protocol.headers import METADATA_BASE, METADATA_PROBE_SET, METADATA_PROXY
from protocol.statuses import PartKind
from tests.edge_agent.fake_cloud import FakeCloud
from tests.edge_agent.tiny_world import CO_PLMS, SECRETS, TinyWorld, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_world(tmp_path_factory.mktemp("world"))


def quiet(stage: str, step: int, steps: int, losses: Mapping[str, float]) -> None:
    pass


def state_bytes(update: TrainedUpdate, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    update.write_state(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def train(
    world: TinyWorld, assignment: Assignment, start: LocalState | None = None, trainer: LocalTrainer | None = None
) -> TrainedUpdate:
    return (trainer or LocalTrainer(world.config)).train(assignment, world.files, start, quiet)


def test_two_rounds_repeat_to_the_bit_whether_models_are_loaded_or_not(
    world: TinyWorld, cloud: FakeCloud, tmp_path: Path
) -> None:
    first, second = world.assignment(cloud, 1), world.assignment(cloud, 2)
    warm = LocalTrainer(world.config)
    update = train(world, first, trainer=warm)
    staged = state_bytes(update, tmp_path / "staged")
    assert state_bytes(train(world, first), tmp_path / "again") == staged
    states = LocalStates(tmp_path / "runs")
    states.adopt(tmp_path / "staged")
    start = states.before("run_1", 2)
    assert start is not None

    next_warm = train(world, second, start, warm)
    next_cold = train(world, second, start)
    assert next_warm.parts == next_cold.parts
    warm_state = state_bytes(next_warm, tmp_path / "warm")
    assert warm_state == state_bytes(next_cold, tmp_path / "cold")
    assert train(world, second, None).parts != next_warm.parts
    assert warm_state["domain_adapter.safetensors"] != staged["domain_adapter.safetensors"]


def test_an_update_names_what_it_starts_from_and_measures_what_was_asked(
    world: TinyWorld, cloud: FakeCloud, tmp_path: Path
) -> None:
    assignment = world.assignment(cloud, 1)
    stages: list[str] = []
    update = LocalTrainer(world.config).train(assignment, world.files, None, lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == [
        "evaluation_before",
        "domain_tuning",
        "mutual_learning",
        "evaluation_after",
    ]
    assert stages.count("evaluation_before") > 3  # between any two tokens: a device stops at once
    assert update.num_examples == len(SECRETS)
    assert set(update.parts) == {PartKind.ADAPTER_DELTA, PartKind.LOGITS}
    assert assignment.adapter is not None
    assert assignment.proxy_manifest is not None
    assert assignment.probe_set is not None
    headers = {}
    for kind, content in update.parts.items():
        (tmp_path / kind).write_bytes(content)
        tensors, headers[kind] = read_tensors(tmp_path / kind)
        assert tensors
    assert headers[PartKind.ADAPTER_DELTA][METADATA_BASE] == assignment.adapter.sha256
    assert headers[PartKind.LOGITS][METADATA_PROBE_SET] == assignment.probe_set.sha256
    assert {header[METADATA_PROXY] for header in headers.values()} == {assignment.proxy_manifest.sha256}
    metrics = update.metrics
    assert metrics.before is not None
    assert metrics.after is not None
    assert metrics.before.num_rows == metrics.after.num_rows == 3
    assert metrics.before.bits_per_byte != metrics.after.bits_per_byte
    assert metrics.alignment is not None
    assert metrics.alignment.coverage > 0.8
    assert {"load", "domain_tuning", "mutual_learning"} <= set(metrics.seconds_by_stage)
    assert metrics.peak_memory_bytes > 10_000_000


def test_the_slms_adapter_is_an_ordinary_peft_folder(world: TinyWorld, cloud: FakeCloud, tmp_path: Path) -> None:
    update = train(world, world.assignment(cloud, 1, evaluate_before=False, evaluate_after=False))
    state_bytes(update, tmp_path / "state")
    slm = load_language_model(world.config.model.path)
    ids = torch.tensor([[1, 2, 3]])
    plain = slm.model(input_ids=ids).logits
    tuned = PeftModel.from_pretrained(slm.model, str(tmp_path / "state" / "slm_adapter"))
    assert not torch.equal(plain, tuned(input_ids=ids).logits)
    assert update.metrics.before is None
    assert update.metrics.after is None


def test_standalone_trains_and_uploads_nothing(world: TinyWorld, cloud: FakeCloud, tmp_path: Path) -> None:
    update = train(world, world.standalone_assignment(cloud))
    assert update.parts == {}
    assert "slm_ce" in update.metrics.losses
    assert set(state_bytes(update, tmp_path / "state")) == {
        "slm_adapter/adapter_config.json",
        "slm_adapter/adapter_model.safetensors",
        "state.json",
    }


def test_a_stop_unwinds_and_leaves_the_models_as_they_were(world: TinyWorld, cloud: FakeCloud) -> None:
    assignment = world.assignment(cloud, 1, evaluate_before=False, evaluate_after=False)
    trainer = LocalTrainer(world.config)
    stop = threading.Event()

    def stop_at_the_second_step(stage: str, step: int, steps: int, losses: Mapping[str, float]) -> None:
        if stage == "mutual_learning" and step == 2:
            stop.set()
            raise Stopped

    with pytest.raises(Stopped):
        trainer.train(assignment, world.files, None, stop_at_the_second_step)
    assert stop.is_set()
    assert train(world, assignment, trainer=trainer).parts == train(world, assignment).parts


def test_a_killed_round_goes_on_from_its_checkpoint_to_the_same_bytes(
    world: TinyWorld, cloud: FakeCloud, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill_at_the_third_step(stage: str, step: int, steps: int, losses: Mapping[str, float]) -> None:
        if (stage, step) == ("mutual_learning", 3):
            raise Killed

    assignment = world.assignment(cloud, 1, evaluate_before=False, evaluate_after=False)
    often = world.config.training.model_copy(update={"checkpoint_steps": 2})
    config = world.config.model_copy(update={"training": often})
    states = LocalStates(tmp_path / "runs")
    with pytest.raises(Killed):
        LocalTrainer(config, states).train(assignment, world.files, None, kill_at_the_third_step)
    folder = tmp_path / "runs" / "run_1" / "training" / assignment.assignment_id
    assert {path.name for path in folder.iterdir()} == {"domain_tuning.safetensors", "mutual_learning.safetensors"}

    taken: list[tuple[str, int]] = []
    update = LocalTrainer(config, states).train(
        assignment, world.files, None, lambda stage, step, steps, losses: taken.append((stage, step))
    )
    assert taken == [("mutual_learning", 3), ("mutual_learning", 4)]
    whole = train(world, assignment)
    assert update.parts == whole.parts
    assert state_bytes(update, tmp_path / "resumed") == state_bytes(whole, tmp_path / "whole")
    states.end_training("run_1")
    assert not folder.exists()


def test_a_checkpoint_from_other_rows_is_not_used_and_that_of_another_assignment_removed(
    world: TinyWorld, cloud: FakeCloud, tmp_path: Path
) -> None:
    states = LocalStates(tmp_path / "runs")
    assignment = world.standalone_assignment(cloud)
    LocalTrainer(world.config, states).train(assignment, world.files, None, quiet)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(world.config.data.train.read_text().splitlines(keepends=True)[:-1]))
    data = world.config.data.model_copy(update={"train": fewer})
    config = world.config.model_copy(update={"data": data})
    with capture_logs() as logs:
        update = LocalTrainer(config, states).train(assignment, world.files, None, quiet)
    assert [entry["event"] for entry in logs] == ["checkpoint_ignored"]
    expected = LocalTrainer(config).train(assignment, world.files, None, quiet)
    assert state_bytes(update, tmp_path / "a") == state_bytes(expected, tmp_path / "b")
    assert states.begin_training("run_2", "asg_9") == tmp_path / "runs" / "run_2" / "training" / "asg_9"
    assert list((tmp_path / "runs").glob("*/training/*")) == []


def test_a_training_that_cannot_fit_is_refused_with_both_numbers(world: TinyWorld, cloud: FakeCloud) -> None:
    """Millions of rows a step of two tiny models need hundreds of gigabytes."""
    huge = CO_PLMS.training.model_copy(update={"batch_size": 4_000_000})
    strategy = CO_PLMS.model_copy(update={"training": huge})
    assignment = world.assignment(cloud, 1, strategy=strategy, evaluate_before=False)
    with pytest.raises(CannotTrain, match=r"not enough memory on cpu: expected to need .* GiB") as caught:
        train(world, assignment)
    assert caught.value.code == "not_enough_memory"
    assert "GiB, mostly activations" in caught.value.reason
    assert len(caught.value.reason) <= 400  # what the server takes


def test_tokenizers_that_do_not_fit_are_refused(world: TinyWorld, cloud: FakeCloud) -> None:
    never = CO_PLMS.model_copy(update={"min_coverage": 1.1})
    with pytest.raises(CannotTrain, match="coverage") as caught:
        train(world, world.assignment(cloud, 1, strategy=never))
    assert caught.value.code == "coverage_too_low"


def test_a_broken_row_is_named_by_line_and_not_quoted(world: TinyWorld, cloud: FakeCloud, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"my diary": "I hid the key"\n')
    data = world.config.data.model_copy(update={"train": broken})
    trainer = LocalTrainer(world.config.model_copy(update={"data": data}))
    with pytest.raises(CannotTrain) as caught:
        trainer.train(world.standalone_assignment(cloud), world.files, None, quiet)
    assert caught.value.code == "data_file_invalid"
    assert "broken.jsonl:2" in caught.value.reason
    assert "key" not in caught.value.reason
    assert str(tmp_path) not in caught.value.reason


def test_a_model_that_went_missing_is_named(world: TinyWorld, cloud: FakeCloud) -> None:
    model = world.config.model.model_copy(update={"path": "/no/such/model"})
    with pytest.raises(CannotTrain, match="/no/such/model") as caught:
        LocalTrainer(world.config.model_copy(update={"model": model})).train(
            world.standalone_assignment(cloud), world.files, None, quiet
        )
    assert caught.value.code == "model_folder_missing"


def test_an_adapter_of_another_model_is_refused(world: TinyWorld, cloud: FakeCloud) -> None:
    other = CO_PLMS.model_copy(update={"proxy_lora": CO_PLMS.proxy_lora.model_copy(update={"rank": 3})})
    with pytest.raises(CannotTrain, match="shape") as caught:
        train(world, world.assignment(cloud, 1, strategy=other, evaluate_before=False))
    assert caught.value.code == "model_unsuitable"


DECLARED = CO_PLMS.model_copy(update={"device_ranks": "declared", "aggregation": "exact_svd"})


def delta_of(update: TrainedUpdate, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "delta"
    path.write_bytes(update.parts[PartKind.ADAPTER_DELTA])
    return read_tensors(path)[0]


def test_a_device_of_a_lower_rank_trains_the_cut_adapter_and_its_own_at_that_rank(
    world: TinyWorld, cloud: FakeCloud, tmp_path: Path
) -> None:
    shared = read_tensors(world.adapter)[0]
    plain = {"strategy": DECLARED, "evaluate_before": False, "evaluate_after": False}
    low = train(world, world.assignment(cloud, 1, adapter_rank=1, **plain))
    delta = delta_of(low, tmp_path)
    assert {name: tensor.shape for name, tensor in delta.items()} == {
        name: (1, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], 1) for name, tensor in shared.items()
    }
    assert all(tensor.any() for tensor in delta.values())
    # phi has the rank too; a round at another one, lower or higher, goes on from it.
    state_bytes(low, tmp_path / "staged")
    phi = read_tensors(tmp_path / "staged" / "domain_adapter.safetensors")[0]
    assert {tensor.shape for tensor in phi.values()} == {tensor.shape for tensor in delta.values()}
    states = LocalStates(tmp_path / "runs")
    states.adopt(tmp_path / "staged")
    start = states.before("run_1", 2)
    for rank, expected in ((1, 1), (None, 2)):
        again = train(world, world.assignment(cloud, 2, adapter_rank=rank, **plain), start)
        assert {t.shape[0] for name, t in delta_of(again, tmp_path).items() if "lora_A" in name} == {expected}


def test_the_owners_limit_holds_whatever_a_run_asks(world: TinyWorld, cloud: FakeCloud) -> None:
    training = world.config.training.model_copy(update={"max_adapter_rank": 1})
    trainer = LocalTrainer(world.config.model_copy(update={"training": training}))
    with pytest.raises(CannotTrain, match="expected an adapter of rank 1 at most, got 2") as caught:
        trainer.train(world.assignment(cloud, 1, evaluate_before=False), world.files, None, quiet)
    assert caught.value.code == "adapter_rank_too_high"
