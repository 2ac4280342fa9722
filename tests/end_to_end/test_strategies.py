"""Rounds over HTTP of strategies that share an adapter of one small model, and of one that a distribution adds."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from protocol.runs import Round, Run
from protocol.statuses import RunStatus
from tests.end_to_end.conftest import rows
from tests.end_to_end.simulated import adapter, assert_equal_bits, assert_learns, deployed, simulated
from tests.end_to_end.small_cloud import OFFLINE, SmallCloud, write_rows

SAME, OTHER = ("device-0", "device-1"), "device-2"
TRAINING = {"steps": 2, "batch_size": 4, "max_length": 64}
LORA = {"rank": 2, "alpha": 4.0}
PLUGIN = Path(__file__).with_name("sign_lora.py")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a distribution in it, as pip leaves it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / PLUGIN.name).write_bytes(PLUGIN.read_bytes())
    about = folder / "sign_lora-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sign-lora\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[cotune.strategies]\nsign_lora = sign_lora:SPEC\n")
    return folder


@pytest.fixture(scope="module")
def alike(
    tmp_path_factory: pytest.TempPathFactory,
    small_models: dict[str, Path],
    small_data: dict[str, Path],
    installed: Path,
) -> Iterator[SmallCloud]:
    """A cloud with two agents of one small model and a third of another."""
    models = small_models | {"slm-1": small_models["slm-0"]}
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    with SmallCloud(tmp_path_factory.mktemp("alike"), models, small_data, {"PYTHONPATH": path}) as cloud:
        cloud.start_agents(3)
        yield cloud


def run_config(cloud: SmallCloud, name: str, **strategy: Any) -> dict[str, Any]:
    settings = {"name": name, "slm_lora": LORA, "training": TRAINING} | strategy
    own = {"slm": str(cloud.models["slm-0"]), "min_updates": 2, "grace_seconds": 1.0, "rounds": 1}
    return cloud.run_config(name, strategy=settings) | own


def check_devices(last: Round) -> None:
    """Those of the run's model are counted; the other one has said why it is not."""
    devices = {each.device_name: each for each in last.devices}
    assert {name: devices[name].status.value for name in SAME} == dict.fromkeys(SAME, "counted")
    if OTHER in devices:  # it may have come too late for the round
        assert "other_tokenizer: this run averages adapters of one small model" in (devices[OTHER].reason or "")


def finished(cloud: SmallCloud, config: dict[str, Any]) -> Run:
    run = cloud.wait_for_run(cloud.client.create_run(config).run_id)
    assert run.status is RunStatus.COMPLETED, run.status_reason
    return run


def test_fed_lora_averages_the_devices_adapters(alike: SmallCloud) -> None:
    run = finished(alike, run_config(alike, "fed_lora") | {"llm": None, "rounds": 2})
    rounds = sorted(alike.client.list_rounds(run.run_id), key=lambda each: each.number)
    for each in rounds:
        check_devices(each)
    traffic = alike.client.traffic(run.run_id)
    assert {kind for kind, count in traffic.up.items() if count} == {"adapter_delta", "metrics"}
    assert {kind for kind, count in traffic.down.items() if count} == {"model_manifest", "adapter", "assignment"}
    thetas = [adapter(alike, run.run_id, number, "proxy") for number in (0, 1, 2)]
    assert any(not torch.equal(thetas[1][name], thetas[2][name]) for name in thetas[0])
    versions = alike.client.list_versions(run.run_id)
    assert all(set(each.metrics["validation"]) == {"proxy"} for each in versions)
    assert "base_model: null" in alike.client.model_card(run.run_id, 2)
    with io.BytesIO() as archive:
        alike.client.download_package(run.run_id, 2, "proxy", archive)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as files:
            configs = [files.extractfile(each) for each in files.getmembers() if "adapter_config" in each.name]
            config = json.load(configs[0])  # type: ignore[arg-type]
    assert config["base_model_name_or_path"] == str(alike.models["slm-0"])


def test_fedcollm_distils_between_the_shared_adapter_and_the_llm(alike: SmallCloud) -> None:
    server = {"steps": 2, "batch_size": 4, "max_length": 64}
    run = finished(alike, run_config(alike, "fedcollm", llm_lora=LORA, server=server))
    last = alike.client.get_round(run.run_id, 1)
    check_devices(last)
    assert set(last.metrics["losses"]) == {"llm_ce", "llm_kl", "slm_ce", "slm_kl"}
    assert {kind for kind, count in alike.client.traffic(run.run_id).up.items() if count} == {
        "adapter_delta",
        "metrics",
    }
    assert "probe_set" not in alike.client.traffic(run.run_id).down
    versions = alike.client.list_versions(run.run_id)
    assert all(set(each.metrics["test"]) == {"llm", "proxy"} for each in versions)
    assert versions[0].llm_adapter_sha256 != versions[1].llm_adapter_sha256


def test_a_strategy_that_a_distribution_adds_runs_without_touching_anything_else(alike: SmallCloud) -> None:
    assert len(PLUGIN.read_text().splitlines()) < 60
    # This process has not got it installed, so it speaks JSON and not our client's language.
    headers = {"Authorization": f"Bearer {alike.key}"}
    with httpx.Client(base_url=alike.address, headers=headers, trust_env=False, timeout=30) as operator:
        config = run_config(alike, "sign_lora", size=0.5) | dict.fromkeys(("llm", "public_data", "evaluation_data"))
        created = operator.post("/v1/runs", json=config)
        assert created.status_code == 201, created.text
        run_id = created.json()["run_id"]
        alike.wait(lambda: operator.get(f"/v1/runs/{run_id}").json()["status"] in ("completed", "failed"))
        run = operator.get(f"/v1/runs/{run_id}").json()
        assert run["status"] == "completed", run["status_reason"]
        wrong = operator.post("/v1/runs", json=config | {"strategy": {"name": "sign_lora", "size": 0}})
        assert wrong.json()["errors"][0]["field"] == "strategy.size"
    before, after = (adapter(alike, run_id, number, "proxy") for number in (0, 1))
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    # Two devices of 12 rows each: both up or both down, one of each, or only one.
    steps = torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.5])
    assert bool(((moved[:, None] - steps).abs().amin(1) < 1e-5).all())
    assert bool((moved.abs() > 0.4).any())


def test_a_run_that_names_no_small_model_is_refused(alike: SmallCloud) -> None:
    headers = {"Authorization": f"Bearer {alike.key}"}
    config = run_config(alike, "fed_lora") | {"slm": None}
    answer = httpx.post(f"{alike.address}/v1/runs", json=config, headers=headers, trust_env=False)
    assert answer.status_code == 422
    assert "strategy `fed_lora` needs `slm`" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["fed_lora", "fedcollm"])
def test_a_simulation_gives_the_same_adapters(alike: SmallCloud, tmp_path: Path, name: str) -> None:
    own = {"llm_lora": LORA, "server": TRAINING} if name == "fedcollm" else {}
    devices = {each.name: each.device_id for each in alike.client.list_devices()}
    config = run_config(alike, name, **own) | {"device_ids": [devices[each] for each in SAME], "rounds": 2, "seed": 3}
    config["evaluation"]["tolerance_bits_per_byte"] = 10.0
    if name == "fed_lora":
        config["llm"] = None
    over_http, here = deployed(alike, config), simulated(alike, config, tmp_path)
    assert_learns(over_http)
    assert_equal_bits(here, over_http)


def test_a_strategy_that_a_distribution_adds_runs_in_the_simulator(
    installed: Path, small_models: dict[str, Path], tmp_path: Path
) -> None:
    for domain in ("one", "two"):
        for split in ("train", "validation", "test"):
            write_rows(tmp_path / "data" / domain / f"{split}.jsonl", rows(f"{domain}-{split}", 4, domain))
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(
        f'name = "added"\nrounds = 1\nslms = ["{small_models["slm-0"]}"]\nmeasured_length = 64\n'
        "evaluation = { max_new_tokens = 2 }\n"
        '[[strategies]]\nname = "sign_lora"\nsize = 0.5\n'
        "training = { steps = 1, batch_size = 2, max_length = 64 }\n"
    )
    out = tmp_path / "added.json"
    arguments = ["simulate", experiment, "--data", tmp_path / "data", "--out", out, "--cache", tmp_path / "cache"]
    path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        [sys.executable, "-c", "from command_line.main import main; main()", *map(str, arguments)],
        env=os.environ | OFFLINE | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads(out.read_text())
    assert [each["entry"]["name"] for each in report["strategies"]] == ["before", "sign_lora"]
    assert set(report["strategies"][1]["cost"]["up"]) == {"adapter_delta"}
