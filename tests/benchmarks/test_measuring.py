import json
import time

import pytest

from benchmarks import measuring
from benchmarks.measuring import Goal, PeakMemory, compare, peak_memory_of, write_results

MIB = 2**20


def hold(mib: int) -> None:
    """Touch `mib` MiB, in two halves that do not live at the same time."""
    for _ in range(2):
        assert len(bytearray(b"\1") * (mib * MIB // 2)) == mib * MIB // 2


def test_ratios_are_of_the_baseline_to_the_candidate() -> None:
    timings = compare({"base": lambda: time.sleep(0.02), "slower": lambda: time.sleep(0.06)}, repeats=3)
    assert timings["base"].speed_ratio == 1.0
    assert 0.2 < timings["slower"].speed_ratio < 0.5
    low, high = timings["slower"].speed_quartiles
    assert low <= timings["slower"].speed_ratio <= high
    assert timings["slower"].time_ratio == pytest.approx(1 / timings["slower"].speed_ratio)
    assert timings["slower"].seconds >= 0.06


def test_candidates_take_turns_in_alternating_order() -> None:
    calls: list[str] = []
    compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, warm_up=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    with pytest.raises(ValueError, match="at least 2 repeats, got 1 and 1"):
        compare({"a": lambda: None}, repeats=1)


def test_peak_memory_is_the_functions_own() -> None:
    ballast = bytearray(b"\1") * (100 * MIB)  # the parent's memory must not count
    small, large = (peak_memory_of("tests.benchmarks.test_measuring:hold", mib=mib) for mib in (2, 80))
    assert 38 * MIB <= large.extra_bytes <= 48 * MIB
    assert small.extra_bytes <= 8 * MIB
    assert small.peak_bytes < len(ballast) + 50 * MIB


def test_results_are_written_with_the_facts(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    path = write_results("something", {"ratio": 2.0})
    written = json.loads(path.read_text())
    assert path.name == "bench_something.json"
    assert written["ratio"] == 2.0
    assert "torch" in written["facts"]["packages"]
    assert written["facts"]["cores"] >= 1


def test_goals() -> None:
    assert Goal("speed", 0.8, 0.8, at_least=True).met
    assert not Goal("size", 46.0, 45.0, at_least=False, unit="KiB").met
    assert PeakMemory(10, 25).extra_bytes == 15
