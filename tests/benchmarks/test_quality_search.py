"""The search for hyper-parameters: the same values for all, and no test row is read."""

from pathlib import Path

import pytest

from benchmarks.quality import Places
from benchmarks.quality_search import OTHER_SEEDS, grid, on_validation_rows, search
from benchmarks.quality_settings import read_preset
from command_line.errors import BadInput
from simulation.setup import set_up
from tests.benchmarks.quality_miniature import made_data, preset_file, quiet
from tests.simulation.tiny_world import CO_PLMS, World, build

VALUES = {"training.learning_rate": [1e-3, 1e-2], "training.weight_decay": [0.0, 0.1]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("world"))


def test_each_strategy_is_tried_as_often_with_the_same_values(world: World) -> None:
    control = {"name": "standalone", "label": "control", "kind": "control"}
    settings = world.settings(CO_PLMS | {"kind": "method"}, {"name": "standalone"}, control)
    tried = grid(settings, VALUES)
    assert list(tried.points) == [f"{name}.{number}" for name in ("co_plms", "standalone") for number in range(4)]
    for entry in tried.settings.strategies:
        values = tried.points[entry.label][1]
        training = entry.settings.training
        assert {f"training.{name}": getattr(training, name) for name in ("learning_rate", "weight_decay")} == values
        assert training.steps == 2
    assert tried.settings.first_seed == OTHER_SEEDS
    with pytest.raises(BadInput, match="which values to try, got none"):
        grid(settings, {})


def test_validation_rows_stand_where_test_rows_would(world: World) -> None:
    experiment = set_up(world.settings(), world.data, [0])
    for device in on_validation_rows(experiment).devices[0]:
        assert device.rows.test == device.rows.validation
    assert experiment.devices[0][0].rows.test != experiment.devices[0][0].rows.validation


def test_a_whole_search(tmp_path: Path) -> None:
    skipped = '"uninformed_proxy", "llm_public", "fed_lora", "fedcollm", "fedcollm_sequential", "fedmkt"'
    file = preset_file(tmp_path, **{'"uninformed_proxy"]': f"{skipped}]"})
    Path(file).write_text(Path(file).read_text() + '\n[search]\n"training.learning_rate" = [1e-3, 1e-2]\n')
    places = Places(made_data(tmp_path / "data"), tmp_path, tmp_path / "out")
    with quiet() as (shown, _):
        found = search(read_preset(file), "homogeneous", places, shown, seeds=1)
    assert [each["strategy"] for each in found] == ["co_plms", "co_plms", "standalone", "standalone"]
    assert {each["values"]["training.learning_rate"] for each in found} == {1e-3, 1e-2}
    assert found[0]["rouge_l"] >= found[1]["rouge_l"]
    assert found[0]["bits_per_byte"] != found[1]["bits_per_byte"]
