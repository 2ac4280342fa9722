"""The rivals of the aggregation benchmark do the work that they are timed for."""

import pytest
import torch

from benchmarks.aggregation import Float32Sum, KahanSum, PairwiseSum, WideSum, measure_payload, product_error
from cotuning.product_mean import ProductMean


def updates(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"a": torch.randn(50, generator=generator)} for _ in range(count)]


@pytest.mark.parametrize(("rival", "within"), [(Float32Sum, 1e-3), (KahanSum, 4e-5), (PairwiseSum, 2e-4), (WideSum, 0)])
def test_rivals_sum_the_same_updates(rival: type, within: float) -> None:
    deltas = updates(40)
    running = rival(deltas[0])
    for place, delta in enumerate(deltas):
        running.add(delta, 1.0 + place)
    total = sum((1.0 + place) * delta["a"].double() for place, delta in enumerate(deltas))
    got = running.sums["a"].double() + (running.wide["a"] if isinstance(running, PairwiseSum) else 0)
    assert float((got - total).abs().max()) <= within
    if rival is not WideSum:
        assert not torch.equal(got, total)


def test_the_error_of_products_is_zero_for_the_same_and_one_for_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        "q.lora_A.weight": torch.randn(2, 6, generator=generator),
        "q.lora_B.weight": torch.randn(5, 2, generator=generator),
    }
    mean = ProductMean(base)
    mean.add({name: torch.zeros_like(tensor) for name, tensor in base.items()}, 1.0)
    assert product_error(base, mean.stacked()) <= 1e-7
    assert product_error({name: torch.zeros_like(tensor) for name, tensor in base.items()}, base) == pytest.approx(1.0)


def test_a_payload_s_size_is_that_of_the_file() -> None:
    assert 25 < measure_payload(410, 4_000, "int8") < measure_payload(410, 4_000, "float16") < 45
