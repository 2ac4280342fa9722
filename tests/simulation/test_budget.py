import pytest

from simulation.budget import PREPARATION, Cost, Crossing, Meter, RoundTraffic, equal_cpu_steps
from simulation.errors import MeasurementError, UndeclaredTraffic

MIB = 2**20


class Clock:
    """Gives the next of its times, in seconds."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self) -> float:
        return self.times.pop(0)


def declared() -> Crossing:
    return Crossing(up=frozenset({"adapter_delta", "logits"}), down=frozenset({"shared_adapter", "proxy_base"}))


def test_seconds_are_added_up_by_stage() -> None:
    meter = Meter(declared(), cpu_clock=Clock(0, 3, 5, 6, 10, 11.5), wall_clock=Clock(0, 2, 2, 3, 3, 4))
    for name in ("saml", "server", "saml"):
        with meter.stage(name):
            pass
    cost = meter.cost()
    assert cost.cpu_seconds == {"saml": 4.5, "server": 1.0}
    assert cost.wall_seconds == {"saml": 3.0, "server": 1.0}


def test_a_stage_that_fails_counts_and_another_may_follow() -> None:
    meter = Meter(declared(), cpu_clock=Clock(0, 3, 3, 4), wall_clock=Clock(0, 2, 2, 3))
    with pytest.raises(KeyError), meter.stage("saml"):
        raise KeyError
    with meter.stage("saml"):
        pass
    assert meter.cost().cpu_seconds == {"saml": 4.0}


def test_stages_do_not_nest() -> None:
    meter = Meter(declared())
    nested = pytest.raises(MeasurementError, match="got 'server' within 'saml'")
    with meter.stage("saml"), nested, meter.stage("server"):
        pass


def test_peak_memory_is_that_of_the_stage() -> None:
    meter = Meter(declared())
    with meter.stage("large"):
        held = bytearray(b"\1") * (96 * MIB)
    del held
    with meter.stage("small"):
        pass
    cost = meter.cost()
    if not cost.peak_by_stage:
        pytest.skip("this system does not let a process forget its peak")
    assert cost.peak_memory_bytes["large"] - cost.peak_memory_bytes["small"] > 64 * MIB


def test_steps_are_counted_by_model() -> None:
    meter = Meter(declared())
    for model, steps in (("phone", 60), ("llm", 40), ("phone", 60)):
        meter.count_steps(model, steps)
    assert meter.cost().steps == {"phone": 120, "llm": 40}
    with pytest.raises(MeasurementError, match="steps of at least 0, got -1 of phone"):
        meter.count_steps("phone", -1)


def test_bytes_by_round_kind_and_direction() -> None:
    meter = Meter(declared())
    for device in ("phone", "laptop"):
        meter.count_bytes(PREPARATION, device, "down", "proxy_base", 1000)
        meter.count_bytes(1, device, "down", "shared_adapter", 10)
    meter.count_bytes(1, "phone", "up", "adapter_delta", 7)
    meter.count_bytes(1, "phone", "up", "adapter_delta", 1)
    meter.take_part(2, ["phone"])
    cost = meter.cost()
    assert cost.traffic == (
        RoundTraffic(round=0, devices=2, down={"proxy_base": 2000}),
        RoundTraffic(round=1, devices=2, up={"adapter_delta": 8}, down={"shared_adapter": 20}),
        RoundTraffic(round=2, devices=1),
    )
    assert cost.num_bytes("up") == {"adapter_delta": 8}
    assert cost.num_bytes("down") == {"proxy_base": 2000, "shared_adapter": 20}
    assert cost.bytes_per_device_and_round(with_preparation=False) == 28 / 3
    assert cost.bytes_per_device_and_round(with_preparation=True) == 2028 / 3
    assert Cost().bytes_per_device_and_round(with_preparation=True) is None


def test_what_was_not_declared_is_refused() -> None:
    meter = Meter(declared())
    with pytest.raises(
        UndeclaredTraffic, match=r"travels up .*\(adapter_delta, logits\), got 'hidden_states' of phone"
    ):
        meter.count_bytes(1, "phone", "up", "hidden_states", 5)
    with pytest.raises(UndeclaredTraffic, match=r"travels down"):
        meter.count_bytes(1, "phone", "down", "adapter_delta", 5)
    with pytest.raises(UndeclaredTraffic, match=r"\(none\)"):
        Meter(Crossing()).count_bytes(1, "phone", "up", "logits", 5)
    with pytest.raises(MeasurementError, match="at least 0 bytes, got -1 of 'logits'"):
        meter.count_bytes(1, "phone", "up", "logits", -1)
    assert meter.cost().traffic == ()


def test_steps_of_equal_cost() -> None:
    # 100 s for 50 steps is 2 s a step; 240 s buy 120.
    assert equal_cpu_steps(method_cpu_seconds=240, standalone_cpu_seconds=100, standalone_steps=50) == 120
    assert equal_cpu_steps(method_cpu_seconds=0.1, standalone_cpu_seconds=100, standalone_steps=50) == 1
    with pytest.raises(MeasurementError, match=r"values above 0, got \{'standalone_cpu_seconds': 0\}"):
        equal_cpu_steps(method_cpu_seconds=1, standalone_cpu_seconds=0, standalone_steps=50)
