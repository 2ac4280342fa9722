"""Which of a round's updates count, and why the others do not."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cotuning.payload import PayloadError, PayloadRows
from cotuning.strategies.aggregation import RoundAggregator
from cotuning.strategies.combining import Combined, NotCounted, SentUpdate, combine, counted_examples
from cotuning.strategies.interface import DeviceMessage
from protocol.strategies import CoPlmsSettings, FeatureBasedSettings, StandaloneSettings

THETA = {"a.lora_A.weight": torch.zeros(2, 3)}


def update(key: str, value: float, *, num_examples: int = 1, **rest: Any) -> SentUpdate:
    def no_logits() -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
        return {}, {"from": key}

    given: dict[str, Any] = {
        "coverage": 1.0,
        "read_delta": lambda: {"a.lora_A.weight": torch.full((2, 3), value)},
        "read_logits": no_logits,
    }
    return SentUpdate(key=key, num_examples=num_examples, **given | rest)


def combined(*updates: SentUpdate, logits: Any = None, **settings: Any) -> Combined:
    chosen = CoPlmsSettings(**settings)
    return combine(updates, chosen, aggregator=RoundAggregator(THETA, chosen), logits=logits)


def unreadable() -> Any:
    raise NotCounted("not_safetensors", "a torn file")


def test_updates_weigh_their_examples_up_to_the_limit_and_less_when_late() -> None:
    result = combined(
        update("a", 1.0, num_examples=3), update("b", 5.0, num_examples=100, discount=0.25), max_examples=4
    )
    # (3 * 1 + 4 * 0.25 * 5) / (3 + 4 * 0.25)
    assert result.aggregate is not None
    assert torch.equal(result.aggregate.adapter["a.lora_A.weight"], torch.full((2, 3), 2.0))
    assert result.counted == ["a", "b"]
    assert result.norms["a"] == pytest.approx(6**0.5)


def test_a_message_is_refused_by_itself_for_its_values_or_by_the_strategy() -> None:
    def carries(*values: float) -> Any:
        return lambda: DeviceMessage({"ids": torch.arange(2), "features": torch.tensor(values)}, {}, 1)

    def check(sent: DeviceMessage) -> None:
        if float(sent.tensors["features"].sum()) > 1:
            raise ValueError("expected less than 1, got more")

    result = combine(
        [
            update("good", 0.0, read_message=carries(0.5)),
            update("silent", 0.0),
            update("not-a-number", 0.0, read_message=carries(float("nan"))),
            update("endless", 0.0, read_message=carries(float("inf"))),
            update("other", 0.0, read_message=carries(2.0)),
            update("torn", 0.0, read_message=unreadable),
        ],
        FeatureBasedSettings(),
        aggregator=None,
        logits=None,
        message=check,
    )
    assert result.counted == ["good", "silent"]
    assert {key: code for key, (code, _) in result.refused.items()} == {
        "not-a-number": "non_finite_values",
        "endless": "non_finite_values",
        "other": "message_mismatch",
        "torn": "not_safetensors",
    }
    assert result.refused["other"][1] == "expected less than 1, got more"


def test_each_refusal_has_its_code_and_leaves_no_trace() -> None:
    def check(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> PayloadRows:
        if metadata["from"] == "mismatch":
            raise PayloadError("other probe set", "a", "b")
        raise_none: Any = None
        return raise_none

    result = combined(
        update("good", 1.0),
        update("torn", 1.0, read_delta=unreadable),
        update("unaligned", 9.0, coverage=0.5),
        update("mismatch", 9.0),
        update("nan", float("nan")),
        logits=check,
    )
    assert result.counted == ["good"]
    assert {key: code for key, (code, _) in result.refused.items()} == {
        "torn": "not_safetensors",
        "unaligned": "coverage_too_low",
        "mismatch": "logits_mismatch",
        "nan": "non_finite_values",
    }
    assert "expected at least 0.80 of the response bytes" in result.refused["unaligned"][1]
    assert result.aggregate is not None
    assert torch.equal(result.aggregate.adapter["a.lora_A.weight"], torch.ones(2, 3))


def test_an_unusual_norm_is_told_by_the_others() -> None:
    ordinary = [update(f"d{number}", 1.0 + number / 100) for number in range(4)]
    settings = {"norm_gate": "reject", "norm_gate_min_updates": 5}
    result = combined(*ordinary, update("far", 50.0), **settings)
    assert result.refused.keys() == {"far"}
    assert result.refused["far"][0] == "norm_outlier"
    few = combined(*ordinary[:3], update("far", 50.0), **settings)
    assert few.counted == ["d0", "d1", "d2", "far"]


def test_where_nothing_counts_there_is_no_aggregate() -> None:
    assert combined(update("torn", 1.0, read_delta=unreadable)).aggregate is None


def test_before_each_update_somebody_may_end_it() -> None:
    seen: list[str] = []
    settings = CoPlmsSettings(norm_gate="reject", norm_gate_min_updates=3)
    updates = [update(key, 1.0) for key in "abc"]
    combine(
        updates,
        settings,
        aggregator=RoundAggregator(THETA, settings),
        logits=None,
        on_update=lambda: seen.append("asked"),
    )
    assert len(seen) == 6  # the norms are read first


def test_where_no_deltas_travel_examples_are_as_they_are_said() -> None:
    assert counted_examples(10**7, StandaloneSettings()) == 10**7
    assert counted_examples(10**7, CoPlmsSettings(max_examples=5)) == 5
