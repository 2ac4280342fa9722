import pytest
from pydantic import ValidationError

from simulation.errors import MeasurementError
from simulation.run_results import (
    LLM,
    Cell,
    RunKey,
    RunResult,
    device_observations,
    model_observations,
    runs_of,
)
from tests.simulation.made_up_runs import made_up_run

RUNS = [made_up_run(strategy, seed, 40.0) for strategy in ("alone", "together") for seed in (0, 1)]


def test_json_gives_back_the_same() -> None:
    assert RunResult.model_validate_json(RUNS[0].model_dump_json()) == RUNS[0]


def test_devices_are_observed_on_their_own_rows() -> None:
    found = device_observations(RUNS, "together")
    assert set(found) == {Cell(checkpoint="0", seed=s, unit=unit) for s in (0, 1) for unit in ("phone", "laptop")}
    assert found[Cell(checkpoint="0", seed=1, unit="phone")] == RUNS[3].scores["phone"]["web"]


def test_the_llm_is_observed_by_set() -> None:
    found = model_observations(RUNS, "alone", LLM, ["units"])
    assert [each.unit for each in found] == ["units", "units"]
    with pytest.raises(MeasurementError, match="expected scores of llm on 'law' in alone, seed 0, checkpoint 0"):
        model_observations(RUNS, "alone", LLM, ["law"])
    with pytest.raises(MeasurementError, match="at least one set of rows for llm"):
        model_observations(RUNS, "alone", LLM, [])


def test_a_strategy_without_runs_or_with_one_twice_is_refused() -> None:
    with pytest.raises(MeasurementError, match="runs of the strategy 'other', got none"):
        runs_of(RUNS, "other")
    with pytest.raises(MeasurementError, match="got one twice: alone, seed 0"):
        runs_of([*RUNS, RUNS[0]], "alone")


def test_a_run_measures_each_device_on_its_own_rows_under_their_name() -> None:
    values = RUNS[0].model_dump()
    with pytest.raises(ValidationError, match="scores of phone on its own rows 'law', got none"):
        RunResult.model_validate(values | {"own": {"phone": "law"}})
    moved = {"phone": {"web": values["scores"]["phone"]["units"]}}
    with pytest.raises(ValidationError, match="under its own name, got others for web"):
        RunResult.model_validate(values | {"own": {"phone": "web"}, "scores": moved})


@pytest.mark.parametrize("name", ["", "../x", "Big", "a/b", "x" * 65])
def test_names_of_strategies_can_be_file_names(name: str) -> None:
    with pytest.raises(ValidationError, match="strategy"):
        RunKey(strategy=name, seed=0)
