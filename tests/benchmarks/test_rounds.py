import struct
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, cast

import pytest

from benchmarks import flower, rounds
from benchmarks.chaos.device import read_tensor_infos, write_safetensors
from benchmarks.processes import Usage
from benchmarks.round_cloud import COLUMNS, ROWS, STRATEGY, TENSORS, RoundTimes
from benchmarks.round_devices import echo
from benchmarks.rounds import FLOWER, Peer, show_memory, show_rounds, summary
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
    assert "Flower is not compared with: it is not installed" in capsys.readouterr().out


class Superlink:
    """Flower as far as `Peer` knows it: plays rounds of so many answers, and fails as it is told to."""

    def __init__(self) -> None:
        self.outcomes: list[int | Exception] = []
        self.ended = False

    @contextmanager
    def running(self, *_given: Any, **_shape: int) -> Iterator[Self]:
        yield self
        self.ended = True

    def superlink_id(self) -> int:
        return 1

    def play(self) -> flower.FlowerRound:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return flower.FlowerRound(100.0, 130.0, outcome)


class Sampled:
    """Processor time as `Usage` gives it."""

    def take(self) -> None:
        pass

    def cpu_seconds(self, _name: str, _started: float, _ended: float) -> float:
        return 8.0


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> Superlink:
    made = Superlink()
    monkeypatch.setattr(rounds, "installed", lambda: True)
    monkeypatch.setattr(rounds, "running_flower", made.running)
    return made


def test_a_round_of_flowers_that_does_not_end_ends_flower_and_not_the_benchmark(
    superlink: Superlink, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    superlink.outcomes = [20, 20, TimeoutError("round 3: not within 600 s")]
    usage = cast("Usage", Sampled())
    with Peer(tmp_path, 20, 3) as peer:
        assert peer.processes() == {FLOWER: [1]}
        for _ in range(3):
            peer.play(usage)
        assert superlink.ended
        assert peer.processes() == {}
    assert peer.gave_up == "round 3: not within 600 s"
    assert "no more of Flower: round 3" in capsys.readouterr().out
    found = summary([[times(2, 3)]] * 3, peer.rounds, 20)
    assert found["times_faster"]["published"] == [15]


def test_flower_that_does_not_begin_is_told_of(
    superlink: Superlink, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    superlink.outcomes = [TimeoutError("round 1: not within 600 s")]
    with Peer(tmp_path, 20, 3) as peer:
        assert superlink.ended
        peer.play(cast("Usage", Sampled()))
    assert peer.rounds == []
    show_rounds(summary([[times(2, 1)]], [], 20) | {"memory_mib": {"server": 900.0}, "flower_gave_up": peer.gave_up})
    assert "Flower is not compared with: round 1: not within 600 s" in capsys.readouterr().out


def test_flower_without_an_answer_of_each_client_is_an_error(superlink: Superlink, tmp_path: Path) -> None:
    superlink.outcomes = [20, 19]
    with Peer(tmp_path, 20, 3) as peer:
        with pytest.raises(RuntimeError, match="expected 20 answers in Flower's round, got 19"):
            peer.play(cast("Usage", Sampled()))
        assert superlink.ended
    superlink.outcomes = [RuntimeError("the SuperLink is gone")]
    superlink.ended = False
    with pytest.raises(RuntimeError, match="SuperLink is gone"), Peer(tmp_path, 20, 3):
        pass
    assert superlink.ended


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
