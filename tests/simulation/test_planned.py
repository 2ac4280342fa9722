"""A control that costs as much as the method: its steps follow from what was measured."""

from pathlib import Path

import pytest

from simulation.errors import SetupError
from simulation.experiment import run_experiment
from simulation.planned import missing_runs, with_known_steps
from simulation.reporting import report_of
from simulation.settings import read_settings
from simulation.setup import set_up
from tests.simulation.tiny_world import CO_PLMS, World

METHOD = CO_PLMS | {"kind": "method"}
ALONE = {"name": "standalone"}
EQUAL_COST = {"name": "standalone", "label": "equal_cost", "kind": "control", "equal_cpu_to": "co_plms"}


def test_its_steps_are_what_the_methods_devices_cost(world: World, tmp_path: Path) -> None:
    experiment = set_up(world.settings(METHOD, EQUAL_COST, ALONE), world.data, [0])
    entries = experiment.settings.strategies
    assert with_known_steps(experiment, tmp_path, entries) == [entries[0], entries[2]]
    assert {key.strategy for key in missing_runs(experiment, tmp_path)} == {
        "before",
        "co_plms",
        "standalone",
        "equal_cost",
    }
    results = {each.key.strategy: each for each in run_experiment(experiment, tmp_path)}
    assert list(results) == ["before", "co_plms", "equal_cost", "standalone"]
    seconds = {name: results[name].cost.cpu_seconds["devices"] for name in ("co_plms", "standalone")}
    steps = max(1, round(seconds["co_plms"] / seconds["standalone"] * 2))
    assert results["equal_cost"].cost.steps["sum: standalone_tuning"] == 2 * steps
    told = f"{steps} steps a round: the processor time of co_plms on its devices"
    assert results["equal_cost"].notes == (told,)
    assert missing_runs(experiment, tmp_path) == []
    assert [each.key for each in run_experiment(experiment, tmp_path)] == [each.key for each in results.values()]
    report = report_of(experiment, list(results.values()), command="", gates=[], seconds=0.0)
    assert report.summary("equal_cost").entry.about == "standalone, the processor time of co_plms"
    assert any("the control equal_cost" in each.measure and each.value is not None for each in report.targets)
    against_whole = next(each for each in report.targets if "full-model FedAvg" in each.measure)
    assert against_whole.met is not None


@pytest.mark.parametrize(
    ("strategies", "said"),
    [
        ([METHOD, EQUAL_COST], "beside a standalone of kind baseline that is; got 'co_plms' with co_plms"),
        ([ALONE, EQUAL_COST], "got 'co_plms' with standalone"),
        (
            [METHOD, ALONE, EQUAL_COST | {"kind": "baseline"}],
            "of a control by standalone, got it of equal_cost, a base",
        ),
        ([METHOD, ALONE, {**METHOD, "label": "x", "equal_cpu_to": "co_plms"}], "got it of x, a method by co_plms"),
    ],
)
def test_it_needs_what_it_is_measured_by(world: World, strategies: list[dict[str, object]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        world.settings(*strategies)


def test_the_file_may_say_so(world: World, tmp_path: Path) -> None:
    path = tmp_path / "experiment.toml"
    strategies = [METHOD, ALONE, EQUAL_COST]
    tables = [
        {key: value for key, value in each.items() if key in ("name", "label", "kind", "equal_cpu_to")}
        for each in strategies
    ]
    lines = ["name = 'x'", "rounds = 1", f"slms = ['{world.model('gpt2')}']"]
    for table in tables:
        lines += ["[[strategies]]", *(f"{key} = '{value}'" for key, value in table.items())]
    path.write_text("\n".join(lines))
    assert read_settings(path).strategies[2].equal_cpu_to == "co_plms"
    path.write_text(path.read_text().replace("equal_cpu_to = 'co_plms'", "equal_cpu_to = 'nobody'"))
    with pytest.raises(SetupError, match="got 'nobody'"):
        read_settings(path)
