"""A strategy's aggregation, as its settings choose it."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cotuning.aggregation import StreamingMean, UpdateRefused, apply_server_update
from cotuning.product_mean import ProductMean
from cotuning.server_optimizers import optimizer_step
from cotuning.strategies.aggregation import Aggregate, RoundAggregator
from protocol.strategies import CoPlmsSettings


def adapter(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "q.lora_A.weight": scale * torch.randn(2, 5, generator=generator),
        "q.lora_B.weight": scale * torch.randn(6, 2, generator=generator),
    }


def aggregate(state: dict[str, Tensor] | None = None, **settings) -> Aggregate:
    aggregator = RoundAggregator(adapter(0), CoPlmsSettings.model_validate(settings), state)
    for seed, weight in ((1, 3), (2, 5)):
        aggregator.add(adapter(seed, 0.1), weight)
    return aggregator.result()


def mean_delta() -> dict[str, Tensor]:
    mean = StreamingMean()
    for seed, weight in ((1, 3), (2, 5)):
        mean.add(adapter(seed, 0.1), weight)
    return mean.result()


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_by_default_it_is_plain_fedavg_bit_for_bit() -> None:
    made = aggregate(server_learning_rate=0.7)
    assert_equal(made.adapter, apply_server_update(adapter(0), mean_delta(), 0.7))
    assert (made.optimizer_state, made.errors) == ({}, {})


def test_an_optimizer_goes_on_from_its_state() -> None:
    settings = {"server_optimizer": {"name": "adam", "beta1": 0.8, "beta2": 0.95, "tau": 0.01}}
    first = aggregate(**settings, server_learning_rate=0.1)
    second = aggregate(first.optimizer_state, **settings, server_learning_rate=0.1)
    options = {"optimizer": "adam", "learning_rate": 0.1, "beta1": 0.8, "beta2": 0.95, "tau": 0.01}
    expected = optimizer_step(adapter(0), mean_delta(), first.optimizer_state, **options)
    assert_equal(second.adapter, expected[0])
    assert_equal(second.optimizer_state, expected[1])
    assert not torch.equal(first.adapter["q.lora_A.weight"], second.adapter["q.lora_A.weight"])


def test_exact_aggregation_reports_what_the_cut_lost() -> None:
    made = aggregate(aggregation="exact_svd", server_learning_rate=0.7)
    mean = ProductMean(adapter(0))
    for seed, weight in ((1, 3), (2, 5)):
        mean.add(adapter(seed, 0.1), weight)
    expected = mean.result(0.7)
    assert_equal(made.adapter, expected.adapter)
    assert made.errors == {
        "relative_error": expected.relative_error,
        "error_bound": expected.relative_error,
        "update_error": expected.update_error,
    }
    assert 0 < made.errors["relative_error"] < made.errors["update_error"] < 1


@pytest.mark.parametrize("aggregation", ["fedavg", "exact_svd"])
def test_the_norm_s_limit_holds(aggregation: str) -> None:
    aggregator = RoundAggregator(
        adapter(0), CoPlmsSettings.model_validate({"aggregation": aggregation, "max_update_norm": 0.01})
    )
    with pytest.raises(UpdateRefused, match=r"at most 0\.01"):
        aggregator.add(adapter(1), 1)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_an_optimizer_over_re_factored_adapters_is_refused(optimizer: str) -> None:
    with pytest.raises(ValidationError, match=rf"exact_svd goes with `server_optimizer.name` sgd, got {optimizer}"):
        CoPlmsSettings.model_validate({"aggregation": "exact_svd", "server_optimizer": {"name": optimizer}})


def test_devices_of_other_ranks_need_means_of_products() -> None:
    with pytest.raises(ValidationError, match="`device_ranks` declared goes with `aggregation` exact_svd, got fedavg"):
        CoPlmsSettings.model_validate({"device_ranks": "declared"})
    declared = CoPlmsSettings.model_validate({"device_ranks": "declared", "aggregation": "exact_svd"})
    assert [declared.rank_for(each) for each in (None, 1, 8, 100)] == [8, 1, 8, 8]
    assert CoPlmsSettings().rank_for(2) == 8


def test_an_update_must_have_the_rank_that_was_assigned() -> None:
    settings = CoPlmsSettings.model_validate({"device_ranks": "declared", "aggregation": "exact_svd"})
    aggregator = RoundAggregator(adapter(0), settings)
    small = {"q.lora_A.weight": torch.ones(1, 5), "q.lora_B.weight": torch.ones(6, 1)}
    for delta, rank in ((adapter(1), 1), (small, None)):
        with pytest.raises(UpdateRefused) as refusal:
            aggregator.add(delta, 1.0, rank=rank)
        assert refusal.value.code == "wrong_tensor_shape"
    assert aggregator.add(small, 1.0, rank=1) == pytest.approx(11**0.5)
    aggregator.add(adapter(1, 0.1), 2.0)
    mean = ProductMean(adapter(0), max_rank=2)
    mean.add(small, 1.0)
    mean.add(adapter(1, 0.1), 2.0)
    assert_equal(aggregator.result().adapter, mean.result().adapter)
