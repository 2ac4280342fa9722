"""Strategies that exchange messages, over HTTP: what crosses the network, and the same adapters as in a simulation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from assets.data import read_examples
from assets.models import load_language_model, save_language_model
from cotuning.candidates import prompt_of
from cotuning.examples import render_prompt
from protocol.runs import Run
from protocol.statuses import RunStatus
from protocol.strategies import STRATEGIES
from tests.end_to_end.simulated import Adapters, adapter, assert_equal_bits, assert_learns, simulated_with_devices
from tests.end_to_end.small_cloud import SmallCloud

ROUNDS = {"fedmkt": 2, "feature_based": 2, "data_based": 3}
"""In the order in which they are played. Three where what the server keeps of a round decides what devices are sent in
the one after the next."""
TRAINING = {"steps": 2, "batch_size": 4, "max_length": 64}
LORA = {"rank": 2, "alpha": 4.0}
OWN: dict[str, dict[str, Any]] = {
    "fedmkt": {"transfer_rows": "all", "transfer_steps": 2, "top_k": 8},
    "data_based": {"candidates": 4, "max_new_tokens": 30},
    "feature_based": {"feature_size": 4},
}


@pytest.fixture(scope="module")
def writer(
    tmp_path_factory: pytest.TempPathFactory, small_models: dict[str, Path], small_data: dict[str, Path]
) -> Path:
    """The LLM, trained until it writes examples in the form that candidates have."""
    torch.set_num_threads(1)
    lm, rows = load_language_model(small_models["llm"]), read_examples(small_data["public"])
    generator, tokens = torch.Generator().manual_seed(0), []
    for place, row in enumerate(rows):
        prompt, answer = (
            lm.tokenizer(text)["input_ids"]
            for text in (
                render_prompt(lm.tokenizer, prompt_of(rows, place, 3, generator)),
                f"Instruction: {row.instruction}\nOutput: {row.output}",
            )
        )
        tokens.append(prompt[-40:] + answer + [lm.table.end_id])
    longest = max(map(len, tokens))
    batch = torch.tensor([each + [lm.table.end_id] * (longest - len(each)) for each in tokens])
    model = lm.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("writer")
    save_language_model(lm, folder)
    return folder


def run_config(cloud: SmallCloud, name: str, llm: Path) -> dict[str, Any]:
    strategy = {"name": name, "slm_lora": LORA, "llm_lora": LORA, "training": TRAINING, "server": TRAINING} | OWN[name]
    config = cloud.run_config(name, strategy=strategy, rounds=ROUNDS[name], seed=3, llm=str(llm))
    config["evaluation"]["tolerance_bits_per_byte"] = 10.0
    return config


def tuned(cloud: SmallCloud, run: Run, number: int) -> Adapters:
    """What each device keeps of a round; after the last one, of the step that follows the run."""
    found = {}
    for each in cloud.client.list_devices():
        if each.device_id in cloud.agents:
            (state,) = (cloud.folder / "devices" / each.name).glob(f"**/{run.run_id}/rounds")
            weights = state / f"{number:06d}" / "slm_adapter" / "adapter_model.safetensors"
            cloud.wait(weights.exists)
            found[each.name] = load_file(weights)
    return found


@pytest.fixture(scope="module")
def played(cloud: SmallCloud, writer: Path) -> dict[str, tuple[dict[str, Any], Run]]:
    """One run after the other: who has the next one to do also looks after the last."""
    runs = {}
    for name in ROUNDS:
        config = run_config(cloud, name, writer)
        run = cloud.wait_for_run(cloud.client.create_run(config).run_id)
        assert run.status is RunStatus.COMPLETED, run.status_reason
        runs[name] = config, run
    return runs


@pytest.mark.parametrize("name", ROUNDS)
def test_the_rounds_give_the_adapters_of_a_simulation(
    cloud: SmallCloud, played: dict[str, tuple[dict[str, Any], Run]], tmp_path: Path, name: str
) -> None:
    (config, run), spec = played[name], STRATEGIES[name]
    traffic = cloud.client.traffic(run.run_id)
    assert {kind for kind, count in traffic.up.items() if count} == spec.parts | {"metrics"}
    down = {kind for kind, count in traffic.down.items() if count}
    assert spec.messages_down < down <= spec.downloads | spec.messages_down | {"assignment"}  # some files were there
    omegas = [{"llm": adapter(cloud, run.run_id, number, "llm")} for number in range(ROUNDS[name] + 1)]
    assert_learns(omegas)
    versions, devices_after = simulated_with_devices(cloud, config, tmp_path)
    assert_equal_bits(versions, omegas)
    states = ROUNDS[name] + spec.last_step
    devices = [tuned(cloud, run, number) for number in (states - 1, states)]  # a device keeps no more
    assert_learns(devices)
    assert_equal_bits(devices_after[states - 2 : states], devices)
