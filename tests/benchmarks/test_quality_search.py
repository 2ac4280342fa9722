"""The search for hyper-parameters: as many points for all, and no test row is read."""

import os
import signal
from pathlib import Path

import pytest

from benchmarks import quality_search
from benchmarks.quality import Places
from benchmarks.quality_search import OTHER_SEEDS, grid, main, on_validation_rows, search
from benchmarks.quality_settings import read_preset
from command_line.errors import BadInput
from command_line.exit_codes import ExitCode
from simulation.setup import set_up
from tests.benchmarks.quality_miniature import made_data, preset_file, quiet
from tests.simulation.tiny_world import CO_PLMS, World, build

SEARCH = {
    "others": [{"training": {"learning_rate": 1e-3}}, {"training": {"learning_rate": 1e-2}}],
    "co_plms": [{"alpha": 0.5}, {"alpha": 0.5, "training": {"learning_rate": 1e-2}}],
}

POINTS = "others = [{ training.learning_rate = 1e-3 }, { training.learning_rate = 1e-2 }]"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("world"))


def test_each_strategy_is_tried_at_its_points(world: World) -> None:
    control = {"name": "standalone", "label": "control", "kind": "control"}
    settings = world.settings(CO_PLMS | {"kind": "method"}, {"name": "standalone"}, control)
    tried = grid(settings, SEARCH)
    assert [tried.points[each.label] for each in tried.settings.strategies] == [
        ("co_plms", SEARCH["co_plms"][0]),
        ("co_plms", SEARCH["co_plms"][1]),
        ("standalone", SEARCH["others"][0]),
        ("standalone", SEARCH["others"][1]),
    ]
    rates = [each.settings.training.learning_rate for each in tried.settings.strategies]
    assert rates == [settings.strategies[0].settings.training.learning_rate, 1e-2, 1e-3, 1e-2]
    assert [each.settings.model_dump().get("alpha") for each in tried.settings.strategies] == [0.5, 0.5, None, None]
    assert {each.settings.training.steps for each in tried.settings.strategies} == {2}
    assert tried.settings.first_seed == OTHER_SEEDS


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({}, "say in `search` what to try of co_plms, got nothing"),
        ({"co_plms": [{"alpha": 1.0}]}, "what to try of standalone, got nothing"),
        ({"others": [{"beta": 1.0}]}, "search, standalone: expected its settings, got beta: Extra inputs"),
    ],
)
def test_a_search_that_cannot_be_made(world: World, search: dict[str, list[dict[str, float]]], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        grid(world.settings(CO_PLMS | {"kind": "method"}, {"name": "standalone"}), search)


def test_validation_rows_stand_where_test_rows_would(world: World) -> None:
    experiment = set_up(world.settings(), world.data, [0])
    for device in on_validation_rows(experiment).devices[0]:
        assert device.rows.test == device.rows.validation
    assert experiment.devices[0][0].rows.test != experiment.devices[0][0].rows.validation


def test_a_whole_search(tmp_path: Path) -> None:
    skipped = '"uninformed_proxy", "llm_public", "fed_lora", "fedcollm", "fedcollm_sequential", "fedmkt"'
    file = preset_file(tmp_path, **{'"uninformed_proxy"]': f"{skipped}]"})
    Path(file).write_text(Path(file).read_text() + f"\n[search]\n{POINTS}\n")
    places = Places(made_data(tmp_path / "data"), tmp_path, tmp_path / "out")
    with quiet() as (shown, _):
        found = search(read_preset(file), "homogeneous", places, shown, seeds=1)
    assert [each["strategy"] for each in found] == ["co_plms", "co_plms", "standalone", "standalone"]
    assert {each["values"]["training"]["learning_rate"] for each in found} == {1e-3, 1e-2}
    assert found[0]["rouge_l"] >= found[1]["rouge_l"]
    assert found[0]["bits_per_byte"] != found[1]["bits_per_byte"]


def test_an_interruption_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_arguments: object, **_named: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(quality_search, "search", interrupted)
    with pytest.raises(SystemExit) as ended:
        main([preset_file(tmp_path), "--data", str(made_data(tmp_path)), "--cache", str(tmp_path / "cache")])
    assert ended.value.code == ExitCode.INTERRUPTED
    assert "the same command goes on where it was" in capsys.readouterr().err
