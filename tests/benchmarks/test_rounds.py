import struct
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks import flower
from benchmarks.chaos.device import read_tensor_infos, write_safetensors
from benchmarks.round_cloud import COLUMNS, ROWS, STRATEGY, TENSORS, RoundTimes
from benchmarks.round_devices import echo
from benchmarks.rounds import show_memory, show_rounds, summary
from cloud_api.assignments import examples
from protocol.headers import METADATA_BASE
from protocol.safetensors_header import TensorInfo
from protocol.strategies import CoPlmsSettings

SHAPES = {"a": TensorInfo("F32", (2, 3)), "b": TensorInfo("F32", (4,))}


def times(published: float, cpu_seconds: float) -> RoundTimes:
    return RoundTimes(published / 2, published, cpu_seconds, {})


def test_an_echo_is_the_adapter_but_for_the_value_that_names_the_device() -> None:
    values = [float(number) for number in range(1, 11)]
    adapter = write_safetensors(SHAPES, struct.pack("<10f", *values), {"format": "x"})
    first, second = (echo(examples.ASSIGNMENT, adapter, number) for number in (0, 7))
    assert read_tensor_infos(first) == read_tensor_infos(adapter)
    assert struct.unpack("<9f", first[-36:]) == struct.unpack("<9f", second[-36:]) == tuple(values[1:])
    assert struct.unpack("<f", second[-40:-36]) == pytest.approx((7e-6,))
    assert examples.ASSIGNMENT.adapter is not None
    assert f'"{METADATA_BASE}": "{examples.ASSIGNMENT.adapter.sha256}"'.encode() in first


def test_the_strategy_is_an_average_of_ten_mib() -> None:
    settings = CoPlmsSettings.model_validate(STRATEGY)
    assert (settings.aggregation, settings.server_optimizer.name, settings.server.steps) == ("fedavg", "sgd", 0)
    assert settings.proxy_lora.rank == ROWS
    assert 4 * TENSORS * ROWS * COLUMNS == 10 * 2**20


def test_ratios_are_of_one_turn_and_processor_time_of_one_client() -> None:
    found = summary(
        [[times(2, 3), times(4, 5)], [times(1, 1), times(1, 2)]],
        [{"seconds": 30, "cpu_seconds": 8}, {"seconds": 50, "cpu_seconds": 10}],
        20,
    )
    assert found["times_faster"]["published"] == [10, 50]
    assert found["cotune"]["published_seconds"] == 1.5
    assert found["cotune"]["cpu_seconds_a_client"] == 2.5 / 20
    assert found["flower"]["cpu_seconds_a_client"] == 9 / 20


def test_without_flower_only_our_rounds_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    goals = show_rounds(summary([[times(2, 1)]], [], 20) | {"memory_mib": {"server": 900.0}})
    assert [(goal.value, goal.met) for goal in goals] == [(0.05, True)]
    assert "not compared" in capsys.readouterr().out


def test_memory_of_many_devices_is_held_against_that_of_few() -> None:
    peaks = {20: {"api": 100.0, "worker": 600.0}, 200: {"api": 105.0, "worker": 690.0}}
    assert [(goal.value, goal.met) for goal in show_memory(peaks)] == [(1.05, True), (pytest.approx(1.15), False)]


def test_ports_are_all_different() -> None:
    assert len(set(flower.free_ports(40))) == 40


def test_the_app_is_of_the_version_that_is_installed_for_it() -> None:
    requirements = (Path(flower.__file__).parent / "flower_app" / "requirements.txt").read_text()
    assert "\nflwr==1.42.0\n" in requirements
    assert '"flwr>=1.42,<1.43"' in (flower.APP / "pyproject.toml").read_text()


def test_a_round_of_flowers_takes_from_its_begin_to_its_end() -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    assert flower.FlowerRound(begin, begin + 35, 20).seconds == 35
