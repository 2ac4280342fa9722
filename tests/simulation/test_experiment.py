"""Experiments that are played: resumed, repeated, with drop-outs, and with models that are lent and given back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cotuning.adapters import AdapterState
from cotuning.model_fingerprint import fingerprint_model
from protocol.strategies import STRATEGIES
from simulation.base_models import BaseModels
from simulation.errors import CacheError, RoundFailed
from simulation.experiment import run_experiment
from simulation.participation import RoundPlan
from simulation.planned import missing_runs
from simulation.player import Listener, Player
from simulation.rounds import Version
from simulation.run_results import RunKey
from simulation.settings import SimulationSettings
from simulation.setup import Experiment, set_up
from tests.simulation.tiny_world import CO_PLMS, LORA, SERVER, World

STANDALONE: dict[str, Any] = {"name": "standalone"}
HOMOGENEOUS: list[dict[str, Any]] = [
    {"name": "centralized", "kind": "bound"},
    {"name": "fed_lora"},
    {"name": "fedcollm", "llm_lora": LORA, "server": SERVER},
    {"name": "fedmkt", "training": {"steps": 1}, "transfer_steps": 1, "server": SERVER},
    {"name": "data_based", "candidates": 4, "max_new_tokens": 6, "server": SERVER},
    {"name": "feature_based", "feature_size": 4, "server": SERVER},
]
BOTH = RoundPlan((0, 1), ())


@pytest.fixture(scope="module")
def experiment(world: World) -> Experiment:
    return set_up(world.settings(), world.data, [0])


def player(experiment: Experiment, folder: Path) -> Player:
    torch.set_num_threads(1)
    return Player(experiment, BaseModels(experiment.settings.llm_loading), folder / "proxies")


def played(
    settings: SimulationSettings, world: World, folder: Path, plans: list[RoundPlan]
) -> tuple[Any, list[Version]]:
    """The first strategy of the settings with seed 0."""
    who, versions = player(set_up(settings, world.data, [0]), folder), list[Version]()
    run = who.begin(settings.strategies[0], 0)
    run.play(plans, versions.append)
    return run, versions


def equal(one: AdapterState | None, other: AdapterState | None) -> bool:
    assert one is not None
    assert other is not None
    return all(torch.equal(one[name], other[name]) for name in one)


def test_every_strategy_is_played_and_measured(world: World, tmp_path: Path) -> None:
    strategies = [CO_PLMS, STANDALONE, *HOMOGENEOUS]
    assert {each["name"] for each in strategies} == set(STRATEGIES)
    settings = world.settings(*strategies, slms=[world.model("gpt2")], transfer=True, measure_rounds=True)
    results = run_experiment(set_up(settings, world.data, [0]), tmp_path)
    assert [each.key.strategy for each in results] == ["before", *(each["name"] for each in strategies)]
    for result in results:
        assert result.own == {"colour": "colour", "sum": "sum"}
        assert all(set(result.scores[device]) == {"colour", "sum"} for device in result.own)
        assert all(scores.num_rows == 3 for sets in result.scores.values() for scores in sets.values())
    served = {each.key.strategy: set(each.scores) - {"colour", "sum"} for each in results}
    assert served["before"] == {"llm", "proxy"}
    assert served["co_plms"] == served["fedcollm"] == {"llm", "proxy"}
    assert (served["standalone"], served["fed_lora"], served["fedmkt"]) == (set(), {"proxy"}, {"llm"})
    before, co_plms = results[:2]
    assert before.scores["proxy"]["sum"].bits != before.scores["llm"]["sum"].bits
    assert co_plms.scores["sum"]["sum"].bits != before.scores["sum"]["sum"].bits
    assert [each.round for each in co_plms.rounds] == [0, 1, 2]
    assert co_plms.cost.steps["sum: mutual_learning"] == 4
    assert co_plms.cost.steps["llm: server_mutual_learning"] == 4
    assert {"distillation", "devices", "server", "evaluation", "measurement"} <= set(co_plms.cost.wall_seconds)
    assert all(peak > 0 for peak in co_plms.cost.peak_memory_bytes.values())


def test_what_crosses_the_network_is_counted(experiment: Experiment, tmp_path: Path) -> None:
    result = run_experiment(experiment, tmp_path)[1]
    once, *rounds = result.cost.traffic
    assert (once.round, set(once.down), once.up) == (0, {"proxy_base", "probe_set"}, {})
    for each in rounds:
        assert (each.devices, set(each.up), set(each.down)) == (2, {"adapter_delta", "logits"}, {"adapter"})
    # A delta is an adapter whose header names one file more.
    assert 0 < rounds[0].up["adapter_delta"] - rounds[0].down["adapter"] < 2 * 120


def test_it_goes_on_where_it_was(experiment: Experiment, tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []

    def stop_at_standalone(key: RunKey, found: bool) -> None:
        told.append((key.strategy, found))
        if key.strategy == "standalone":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, tmp_path, Listener(stop_at_standalone))
    assert missing_runs(experiment, tmp_path) == [RunKey(strategy="standalone", seed=0)]
    results = run_experiment(experiment, tmp_path, Listener(lambda key, found: told.append((key.strategy, found))))
    first, second = told[:3], told[3:]
    assert first == [("before", False), ("co_plms", False), ("standalone", False)]
    assert second == [("before", True), ("co_plms", True), ("standalone", False)]
    again = run_experiment(experiment, tmp_path / "again")
    assert [each.scores for each in again] == [each.scores for each in results]


def test_a_torn_result_is_told_of_before_anything_trains(experiment: Experiment, tmp_path: Path) -> None:
    run_experiment(experiment, tmp_path)
    kept = next(tmp_path.glob("*/standalone-seed0-0.json"))
    kept.write_bytes(kept.read_bytes()[:100])
    next(tmp_path.glob("*/before-seed0-0.json")).unlink()
    told: list[RunKey] = []
    with pytest.raises(CacheError, match="expected a whole JSON file, got 100 bytes"):
        run_experiment(experiment, tmp_path, Listener(lambda key, _: told.append(key)))
    assert told == []


def test_a_device_that_drops_out_leaves_no_trace(world: World, tmp_path: Path) -> None:
    settings = world.settings(CO_PLMS)
    run, dropped = played(settings, world, tmp_path, [BOTH, RoundPlan((0, 1), (1,))])
    _, absent = played(settings, world, tmp_path, [BOTH, RoundPlan((0,), ())])
    _, both = played(settings, world, tmp_path, [BOTH, BOTH])
    assert equal(dropped[2].shared_adapter, absent[2].shared_adapter)
    assert not equal(dropped[2].shared_adapter, both[2].shared_adapter)
    assert [each.devices for each in run.meter.cost().traffic] == [2, 2, 2]


def test_models_are_given_back_as_they_were_lent(experiment: Experiment, world: World, tmp_path: Path) -> None:
    who = player(experiment, tmp_path)
    lent = [who.models.llm(world.model("llama")), who.models.slm(world.model("gpt2"))]
    before = [fingerprint_model(each) for each in lent]
    for entry in experiment.settings.strategies:
        who.begin(entry, 0).play([BOTH])
    assert [fingerprint_model(each) for each in lent] == before
    assert who.models.slm(world.model("gpt2")) is lent[1]


def test_a_proxy_is_distilled_once_for_all_that_need_the_same(world: World, tmp_path: Path) -> None:
    told: set[str] = set()
    other = CO_PLMS | {"label": "co_plms_alone", "alpha": 0.0}
    experiment = set_up(world.settings(CO_PLMS, other), world.data, [0])
    results = run_experiment(experiment, tmp_path, Listener(on_progress=lambda what, done, total: told.add(what)))
    assert "proxy: distillation" in told
    assert len(list((tmp_path / "proxies").glob("*/cotune_distillation.json"))) == 1
    assert all("is shared by all strategies" in each.notes[0] for each in results[1:])


def test_a_control_has_a_proxy_of_its_own(world: World, tmp_path: Path) -> None:
    fresh = {"source": "config", "layers": 1, "hidden_size": 8, "steps": 0, "max_length": 64}
    uninformed = CO_PLMS | {"label": "uninformed_proxy", "kind": "control", "proxy": fresh}
    settings = world.settings(CO_PLMS, uninformed)
    who = player(set_up(settings, world.data, [0]), tmp_path)
    informed, other = (who.begin(entry, 0).prepared.shared_model for entry in settings.strategies)
    assert informed is not None
    assert other is not None
    assert (informed.base.config.hidden_size, other.base.config.hidden_size) == (16, 8)
    assert len(list((tmp_path / "proxies").glob("*/cotune_distillation.json"))) == 2


@pytest.mark.parametrize(
    ("hopeless", "said"),
    [
        pytest.param({"max_update_norm": 1e-12}, r"round 1: .*norm_out_of_range", id="nothing counts"),
        pytest.param({"training": {"learning_rate": 1e38}}, r"round 1, colour: ", id="no numbers"),
    ],
)
def test_a_run_that_cannot_go_on_ends_with_the_reason(
    world: World, tmp_path: Path, hopeless: dict[str, Any], said: str
) -> None:
    experiment = set_up(world.settings(STANDALONE, CO_PLMS | hopeless), world.data, [0])
    with pytest.raises(RoundFailed, match=r"co_plms, seed 0, checkpoint 0: " + said):
        run_experiment(experiment, tmp_path)
    assert missing_runs(experiment, tmp_path) == [RunKey(strategy="co_plms", seed=0)]


def test_devices_with_ranks_of_their_own(world: World, tmp_path: Path) -> None:
    ranked = CO_PLMS | {"aggregation": "exact_svd", "device_ranks": "declared"}
    run, versions = played(world.settings(ranked, devices={"ranks": [1, None]}), world, tmp_path, [BOTH])
    assert versions[1].promoted
    domain = {name: local.domain_adapter for name, local in run.local.items()}
    ranks = {name: {min(each.shape) for each in (state or {}).values()} for name, state in domain.items()}
    assert ranks == {"colour": {1}, "sum": {2}}


def test_only_the_method_may_be_measured_on_every_devices_rows(world: World, tmp_path: Path) -> None:
    settings = world.settings(CO_PLMS | {"kind": "method"}, STANDALONE, transfer="method")
    found = {each.key.strategy: each for each in run_experiment(set_up(settings, world.data, [0]), tmp_path)}
    sets = {name: set(each.scores["sum"]) for name, each in found.items()}
    assert sets == {"before": {"colour", "sum"}, "co_plms": {"colour", "sum"}, "standalone": {"sum"}}
    # What another kind has measured is no part of what this one has.
    other = set_up(world.settings(CO_PLMS, STANDALONE, transfer="method"), world.data, [0])
    assert missing_runs(other, tmp_path) == [RunKey(strategy="co_plms", seed=0)]
