"""Devices of a lower rank: what they start from, and how theta is published for them."""

import pytest
import torch

from cotuning.product_mean import lora_pairs
from cotuning.strategies.device_ranks import device_start
from tests.cotuning.strategy_inputs import LORA, same
from tests.cotuning.test_strategies import World, settings


def test_where_devices_cut_theta_it_is_published_with_its_greatest_components_first() -> None:
    """The same products as without; each layer's first component alone is then the best cut of rank 1."""
    world = World()
    plain = settings(aggregation="exact_svd")
    ordered = plain.model_copy(update={"device_ranks": "declared"})
    for changes in ({}, {"server": plain.server.model_copy(update={"steps": 0})}):
        start = {name: 0.05 * torch.ones_like(tensor).cumsum(0) + tensor for name, tensor in world.theta.items()}
        one, other = (
            world.server(settings=each.model_copy(update=changes), shared_adapter=start).shared_adapter
            for each in (plain, ordered)
        )
        for left, right in lora_pairs(one).items():
            whole = one[left].double() @ one[right].double()
            torch.testing.assert_close(other[left].double() @ other[right].double(), whole, rtol=1e-4, atol=1e-6)
            first = other[left][:, :1].double() @ other[right][:1].double()
            best = torch.linalg.vector_norm(torch.linalg.svdvals(whole)[1:])
            torch.testing.assert_close(torch.linalg.matrix_norm(whole - first), best, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 1])
def test_a_device_starts_from_theta_cut_to_its_rank(rank: int | None) -> None:
    world = World()
    declared = settings(aggregation="exact_svd", device_ranks="declared")
    start = device_start(declared, rank, world.theta, None, seed=9)
    assert start.settings == declared.model_copy(
        update={"proxy_lora": LORA.model_copy(update={"rank": rank or LORA.rank})}
    )
    result = world.device(settings=start.settings, shared_adapter=start.shared_adapter)
    assert {tensor.shape for tensor in result.delta.values()} == {t.shape for t in start.shared_adapter.values()}
    full = world.device(settings=settings())
    assert same(result.delta, full.delta) is (rank is None)
    uniform = device_start(settings(), None, world.theta, world.theta, seed=9)
    assert uniform.shared_adapter is world.theta
    assert uniform.domain_adapter is world.theta
    for wrong in (0, LORA.rank + 1):
        with pytest.raises(ValueError, match=rf"expected a rank in 1..{LORA.rank}, got {wrong}"):
            device_start(declared, wrong, world.theta, None, seed=9)
