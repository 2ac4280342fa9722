"""Gates are measured on what no device has trained, and once."""

from pathlib import Path
from typing import Any

import pytest

from simulation.base_models import BaseModels
from simulation.errors import CacheError
from simulation.gate_checks import check_gates, judged_entry
from simulation.player import Listener
from simulation.setup import Experiment, set_up
from tests.simulation.tiny_world import CO_PLMS, SERVER, World

FEDMKT: dict[str, Any] = {"name": "fedmkt", "training": {"steps": 1}, "transfer_steps": 1, "server": SERVER}
STANDALONE = {"name": "standalone"}


def checked(experiment: Experiment, folder: Path, told: list[str] | None = None) -> Any:
    noted = told if told is not None else []
    listener = Listener(on_progress=lambda what, done, total: noted.append(what))
    return check_gates(experiment, folder, BaseModels(experiment.settings.llm_loading), listener)


def test_the_llm_is_tuned_on_public_rows_for_as_many_steps_as_in_the_run(world: World, tmp_path: Path) -> None:
    experiment = set_up(world.settings(CO_PLMS, STANDALONE), world.data, [0])
    told: list[str] = []
    gates = checked(experiment, tmp_path, told)
    assert [each.name for each in gates] == ["LLM answers", "LLM leads", "proxy keeps the lead"]
    assert told.count("LLM on public rows") == 2 * SERVER["steps"]
    leads = gates[1].figures
    assert set(leads) == {"colour", "sum"}
    # Rows about sums are public: there the LLM learns something.
    longer = CO_PLMS | {"server": SERVER | {"steps": 30, "llm_learning_rate": 1e-2}}
    better = checked(set_up(world.settings(longer), world.data, [0]), tmp_path)[1].figures
    assert better["sum"] > leads["sum"] + 0.1


def test_they_are_measured_once(world: World, tmp_path: Path) -> None:
    experiment = set_up(world.settings(CO_PLMS), world.data, [0])
    gates = checked(experiment, tmp_path)
    told: list[str] = []
    assert checked(experiment, tmp_path, told) == gates
    assert told == []
    next(tmp_path.glob("gates-*.json")).write_text("[{}]")
    with pytest.raises(CacheError, match="expected gates, got"):
        checked(experiment, tmp_path)


def test_whose_llm_they_are_about(world: World) -> None:
    method = CO_PLMS | {"kind": "method"}
    labels = [judged_entry(world.settings(*each)) for each in ((FEDMKT, method), (FEDMKT, STANDALONE), (STANDALONE,))]
    assert [each.label if each is not None else None for each in labels] == ["co_plms", "fedmkt", None]


def test_a_method_without_a_proxy_has_no_gate_of_one(world: World, tmp_path: Path) -> None:
    gates = checked(set_up(world.settings(FEDMKT), world.data, [0]), tmp_path)
    assert [each.name for each in gates] == ["LLM answers", "LLM leads"]
