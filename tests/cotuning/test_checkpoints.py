"""A training that is killed and goes on gives the bits of one that was not."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from assets.checkpoints import FolderCheckpoints
from assets.tensors import read_tensors
from cotuning.adapters import AdapterState, activate, adapted, adapter_state, fresh_adapter, lora_config
from cotuning.checkpoints import capture, restore
from cotuning.encoded_rows import EncodedRows
from cotuning.strategies import co_plms
from cotuning.strategies.results import DeviceResult, ServerResult
from cotuning.training import Learner, Step, draw_batches, row_sizes, train
from cotuning.tuning import tune_adapter
from protocol.strategies import CoPlmsSettings, LocalTraining, LoraSettings, ServerTraining
from tests.cotuning.strategy_inputs import device_inputs, same, server_inputs, silent
from tests.tiny_models import tiny_examples, tiny_language_model

ROWS = tiny_examples(16)


class Killed(Exception):
    pass


def killed_at(stage: str, step: int) -> Callable[[str, int, int, Mapping[str, float]], None]:
    def on_progress(now: str, done: int, _: int, losses: Mapping[str, float]) -> None:
        if (now, done) == (stage, step):
            raise Killed

    return on_progress


def kept(folder: Path, *, every: int = 2, configuration: str = "one", told: list[str] | None = None) -> Any:
    heard = [] if told is None else told
    return FolderCheckpoints(folder, configuration=configuration, every=every, on_ignored=heard.append)


def tune(on_progress: Any = silent, checkpoints: Any = None, **changes: Any) -> tuple[AdapterState, dict[str, float]]:
    """Twelve steps with dropout, so that the generators' state matters."""
    lm = tiny_language_model("gpt2")
    options: dict[str, Any] = {"learning_rate": 1e-2, "seed": 3, "stage": "test"}
    with adapted(lm, lora_config(lm, rank=2, alpha=4.0, dropout=0.3), {"slm": 5}) as lent:
        activate(lent, ["slm"], trainable=["slm"])
        batches = draw_batches(row_sizes(ROWS), batch_size=4, steps=12, seed=3)
        rows = EncodedRows(lent, ROWS, max_length=64)
        losses = tune_adapter(
            lent, "slm", rows, batches, on_progress=on_progress, checkpoints=checkpoints, **options | changes
        )
        return adapter_state(lent, "slm"), losses


@pytest.mark.parametrize("killed", [1, 5, 6, 11, 12])
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path, killed: int) -> None:
    whole, whole_losses = tune()
    with pytest.raises(Killed):
        tune(killed_at("test", killed), kept(tmp_path))
    steps: list[int] = []
    resumed, losses = tune(lambda stage, step, total, _: steps.append(step), kept(tmp_path))
    assert same(resumed, whole)
    assert losses == whole_losses
    assert steps == list(range((killed // 2) * 2 + 1, 13))  # nothing was trained twice but what was after the last one


def test_being_killed_again_and_again_changes_nothing(tmp_path: Path) -> None:
    whole, _ = tune()
    for step in (3, 4, 7, 11):
        with pytest.raises(Killed):
            tune(killed_at("test", step), kept(tmp_path, every=1))
    resumed, _ = tune(silent, kept(tmp_path, every=1))
    assert same(resumed, whole)


def test_keeping_states_changes_no_bit_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    assert same(tune(silent, kept(tmp_path))[0], tune()[0])
    tune(silent, kept(tmp_path))  # the stage is done: only read
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"learning_rate": 2e-2}, {"gradient_clip": 0.5}, {"weight_decay": 0.1}])
def test_a_state_of_other_settings_is_ignored_with_a_statement(tmp_path: Path, change: dict[str, float]) -> None:
    with pytest.raises(Killed):
        tune(killed_at("test", 6), kept(tmp_path))
    told: list[str] = []
    resumed, _ = tune(silent, kept(tmp_path, told=told), **change)
    assert same(resumed, tune(**change)[0])
    assert len(told) == 1
    assert "belongs to another training: expected configuration" in told[0]
    assert "test.safetensors" in told[0]


def test_a_state_of_another_configuration_is_ignored(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        tune(killed_at("test", 6), kept(tmp_path))
    told: list[str] = []
    steps: list[int] = []
    tune(lambda stage, step, total, _: steps.append(step), kept(tmp_path, configuration="two", told=told))
    assert steps == list(range(1, 13))
    assert len(told) == 1


@pytest.mark.parametrize("size", [0, 7, 500])
def test_a_damaged_file_is_ignored_with_a_statement(tmp_path: Path, size: int) -> None:
    with pytest.raises(Killed):
        tune(killed_at("test", 6), kept(tmp_path))
    path = tmp_path / "test.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    told: list[str] = []
    resumed, _ = tune(silent, kept(tmp_path, told=told))
    assert same(resumed, tune()[0])
    assert len(told) == 1
    assert "is no checkpoint" in told[0]


def test_the_files_are_safetensors_and_nothing_is_left_over(tmp_path: Path) -> None:
    tune(silent, kept(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["test.safetensors"]
    tensors, header = read_tensors(tmp_path / "test.safetensors")
    assert header["format"] == "cotune-checkpoint/1"
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"parameter", "optimizer", "generator"}


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every 1 or more steps, got 0"):
        kept(tmp_path, every=0)
    with pytest.raises(ValueError, match="expected a stage name"):
        kept(tmp_path).read("../secret", "x")
    weight = torch.zeros(2, requires_grad=True)
    optimizers = {"one": torch.optim.AdamW([weight])}
    other = {"one": torch.optim.AdamW([torch.zeros(3, requires_grad=True)])}
    with pytest.raises(ValueError, match=r"expected a checkpoint of parameters .*\[2\].*got .*\[3\]"):
        restore(optimizers, capture(other))


def test_a_parameter_without_a_gradient_has_no_moments_and_stays_so(tmp_path: Path) -> None:
    def run(on_progress: Any, checkpoints: Any) -> list[torch.Tensor]:
        used, unused = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)

        def step_at(step: int) -> list[Step]:
            return [Step({"one": (used * used).sum()}, {})]

        learners = {"one": Learner([used, unused], 0.1)}
        train(learners, step_at, steps=6, stage="test", on_progress=on_progress, checkpoints=checkpoints)
        return [used.detach(), unused.detach()]

    whole = run(silent, None)
    with pytest.raises(Killed):
        run(killed_at("test", 4), kept(tmp_path))
    resumed = run(silent, kept(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def device_round(on_progress: Any, checkpoints: Any = None) -> DeviceResult:
    lora = LoraSettings(rank=2, alpha=4, dropout=0.2)
    settings = CoPlmsSettings(
        slm_lora=lora,
        proxy_lora=lora,
        training=LocalTraining(steps=5, batch_size=4, max_length=64),
        domain_steps=4,
        top_k=4,
    )
    proxy = tiny_language_model("llama_proxy")
    with adapted(proxy, lora_config(proxy, rank=2, alpha=4.0), {"shared": 1}) as lent:
        theta = adapter_state(lent, "shared")
    given = device_inputs(
        tiny_language_model("qwen2"),
        ROWS,
        shared_model=proxy,
        shared_adapter=theta,
        probe=tiny_examples(4, start=100),
        seed=0,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )
    return co_plms.device_step(given, settings)


@pytest.mark.parametrize(("stage", "step"), [("domain_tuning", 3), ("domain_tuning", 4), ("mutual_learning", 4)])
def test_a_devices_round_goes_on_in_the_stage_in_which_it_was_killed(tmp_path: Path, stage: str, step: int) -> None:
    whole = device_round(silent)
    with pytest.raises(Killed):
        device_round(killed_at(stage, step), kept(tmp_path))
    seen: list[tuple[str, int]] = []
    resumed = device_round(lambda now, done, steps, losses: seen.append((now, done)), kept(tmp_path))
    assert same(resumed.delta, whole.delta)
    assert same(resumed.logits, whole.logits)
    assert same(resumed.slm_adapter, whole.slm_adapter)
    assert resumed.domain_adapter is not None
    assert whole.domain_adapter is not None
    assert same(resumed.domain_adapter, whole.domain_adapter)
    assert resumed.losses == whole.losses
    assert seen[0] == (stage, step - step % 2 + 1) if step < 4 or stage == "mutual_learning" else seen[0][1] == 1


def server_round(on_progress: Any, checkpoints: Any = None) -> ServerResult:
    lora = LoraSettings(rank=2, alpha=4, dropout=0.2)
    server = ServerTraining(steps=5, batch_size=4, micro_batch_size=3, max_length=64)
    proxy = tiny_language_model("llama_proxy")
    given = server_inputs(
        llm=tiny_language_model("llama"),
        shared_model=proxy,
        shared_adapter=fresh_adapter(proxy, lora_config(proxy, **lora.model_dump()), seed=1),
        public=ROWS,
        probe=tiny_examples(4, start=100),
        seed=0,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )
    return co_plms.server_step(given, CoPlmsSettings(proxy_lora=lora, llm_lora=lora, server=server))


@pytest.mark.parametrize("step", [1, 4])
def test_the_clouds_round_goes_on_where_it_was_killed_in_micro_batches_too(tmp_path: Path, step: int) -> None:
    whole = server_round(silent)
    with pytest.raises(Killed):
        server_round(killed_at("server_mutual_learning", step), kept(tmp_path))
    seen: list[int] = []
    resumed = server_round(lambda stage, done, steps, losses: seen.append(done), kept(tmp_path))
    assert seen == list(range(step - step % 2 + 1, 6))
    assert same(resumed.shared_adapter, whole.shared_adapter)
    assert same(resumed.llm_adapter, whole.llm_adapter)
    assert resumed.losses == whole.losses
