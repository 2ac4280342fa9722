"""A run of the small cloud, played again by the simulator."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load

from assets.data import read_examples
from protocol.runs import RunCreate
from protocol.statuses import RunStatus
from simulation.base_models import BaseModels
from simulation.partition import DeviceRows
from simulation.player import Player
from simulation.rounds import Version
from simulation.settings import settings_of
from simulation.setup import Device, Experiment
from tests.end_to_end.small_cloud import SmallCloud

Adapters = dict[str, dict[str, torch.Tensor]]
"""`proxy`, `llm` -> adapter."""


def deployed(cloud: SmallCloud, config: dict[str, Any]) -> list[Adapters]:
    """Run `config` over HTTP; the adapters of each version."""
    run = cloud.wait_for_run(cloud.client.create_run(config).run_id)
    assert run.status is RunStatus.COMPLETED, run.status_reason
    versions = cloud.client.list_versions(run.run_id)
    assert [each.number for each in versions] == list(range(config["rounds"] + 1))
    hashes = [{"proxy": each.proxy_adapter_sha256, "llm": each.llm_adapter_sha256} for each in versions]
    return [
        {name: adapter(cloud, run.run_id, number, name) for name, sha256 in held.items() if sha256 is not None}
        for number, held in enumerate(hashes)
    ]


def adapter(cloud: SmallCloud, run_id: str, number: int, model: str) -> dict[str, torch.Tensor]:
    """An adapter as the API gives it to operators."""
    path = f"/v1/runs/{run_id}/versions/{number}/adapters/{model}"
    answer = httpx.get(f"{cloud.address}{path}", headers={"Authorization": f"Bearer {cloud.key}"}, trust_env=False)
    assert answer.status_code == 200, answer.text
    return load(answer.content)


def simulated(cloud: SmallCloud, config: dict[str, Any], folder: Path) -> list[Adapters]:
    """Play `config` in this process, with the devices in the order of their ids; the adapters of each version."""
    return simulated_with_devices(cloud, config, folder)[0]


def simulated_with_devices(
    cloud: SmallCloud, config: dict[str, Any], folder: Path
) -> tuple[list[Adapters], list[Adapters]]:
    """The same, and what the devices have after each round and after the run: their SLMs' adapters by device."""
    run = RunCreate.model_validate(config)
    names = {each.device_id: each.name for each in cloud.client.list_devices()}
    chosen = sorted((each, names[each]) for each in config["device_ids"])
    slms = [str(cloud.models[name.replace("device", "slm")]) for _, name in chosen]
    table = {key: config[key] for key in ("name", "rounds", "llm", "probe_rows", "proxy", "evaluation")}
    settings = settings_of(table | {"slms": slms, "first_seed": run.seed, "strategies": [config["strategy"]]})
    test = tuple(read_examples(cloud.data["test"]))
    devices = []
    for (_, name), slm in zip(chosen, slms, strict=True):
        train = tuple(read_examples(cloud.data[name]))
        devices.append(Device(DeviceRows(name, {name: len(train)}, train, test, test, "test"), slm, None))
    public = tuple(read_examples(run.public_data)) if run.public_data is not None else ()
    experiment = Experiment(settings, folder, public, 0, {run.seed: devices}, {})
    torch.set_num_threads(1)
    player = Player(experiment, BaseModels(settings.llm_loading), folder / "proxies")
    run_here = player.begin(settings.strategies[0], run.seed)
    versions: list[Adapters] = []
    devices_after: list[Adapters] = []

    def keep_devices() -> None:
        held = {name: each.slm_adapter for name, each in run_here.local.items()}
        devices_after.append({name: state for name, state in held.items() if state is not None})

    def keep(version: Version) -> None:
        held = {"proxy": version.shared_adapter, "llm": version.llm_adapter}
        versions.append({name: state for name, state in held.items() if state is not None})
        if version.number:
            keep_devices()

    run_here.play(player.plans(run.seed), keep)
    keep_devices()
    return versions, devices_after


def assert_equal_bits(ours: list[Adapters], theirs: list[Adapters]) -> None:
    """The same adapters with the same tensors, bit for bit."""
    assert [set(each) for each in ours] == [set(each) for each in theirs]
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for model in one:
            assert one[model].keys() == other[model].keys()
            unequal = [name for name in one[model] if not torch.equal(one[model][name], other[model][name])]
            assert unequal == [], f"{model}, version {number}"


def assert_learns(versions: list[Adapters]) -> None:
    """Every adapter changes in every round: equal ones would prove nothing."""
    for before, after in pairwise(versions):
        for model, state in after.items():
            assert any(not torch.equal(state[name], before[model][name]) for name in state), model
