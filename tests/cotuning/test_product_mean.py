"""The mean of LoRA products against full matrices summed device by device."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotuning.aggregation import StreamingMean, UpdateRefused, apply_server_update
from cotuning.product_mean import ProductMean, at_rank, by_singular_values, lora_pairs, resized, update_rank

Adapter = dict[str, Tensor]
LAYERS = {"q": (12, 10), "down": (9, 14)}
RANK, ALPHA = 4, 16.0


def adapter(rank: int = RANK, *, seed: int, scale: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer, (outputs, inputs) in LAYERS.items():
        state[f"{layer}.lora_A.weight"] = scale * torch.randn(rank, inputs, generator=generator)
        state[f"{layer}.lora_B.weight"] = scale * torch.randn(outputs, rank, generator=generator)
    return state


def products(state: Adapter) -> dict[str, Tensor]:
    """What peft adds to each layer's weight: alpha / r times B A, float64."""
    found = {}
    for layer in LAYERS:
        left, right = state[f"{layer}.lora_B.weight"].double(), state[f"{layer}.lora_A.weight"].double()
        found[layer] = ALPHA / right.shape[0] * left @ right
    return found


def moved(start: Adapter, delta: Adapter) -> Adapter:
    return {name: start[name].double() + delta[name].double() for name in start}


def slow_mean(base: Adapter, updates: list[tuple[Adapter, Adapter, float]], rate: float = 1.0) -> dict[str, Tensor]:
    """base's products + rate * sum_i w_i (products after - products before), with full matrices."""
    total = sum(weight for _, _, weight in updates)
    result = products(base)
    for start, delta, weight in updates:
        before, after = products(start), products(moved(start, delta))
        for layer in LAYERS:
            result[layer] = result[layer] + rate * weight / total * (after[layer] - before[layer])
    return result


def relative(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    error = sum(float((got[layer] - exact[layer]).square().sum()) for layer in LAYERS)
    return math.sqrt(error / sum(float(exact[layer].square().sum()) for layer in LAYERS))


def round_of(base: Adapter, ranks: list[int], scale: float = 0.3) -> list[tuple[Adapter, Adapter, float]]:
    return [
        (at_rank(base, rank, seed=5), adapter(rank, seed=100 + place, scale=scale), float(1 + place % 3))
        for place, rank in enumerate(ranks)
    ]


def mean_of(base: Adapter, updates: list[tuple[Adapter, Adapter, float]], **options) -> ProductMean:
    mean = ProductMean(base, seed=5, **options)
    for _, delta, weight in updates:
        mean.add(delta, weight)
    return mean


@pytest.mark.parametrize("ranks", [[4], [4, 4, 4], [2, 4, 8, 1, 4]])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_the_stack_is_the_exact_mean_of_the_products(ranks: list[int], rate: float) -> None:
    base = adapter(seed=0)
    updates = round_of(base, ranks)
    stacked = mean_of(base, updates, max_rank=8).stacked(rate)
    assert relative(products(stacked), slow_mean(base, updates, rate)) <= 1e-6


@pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 4, 8, 1, 4]])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_the_adapter_is_the_mean_of_the_products_cut_to_rank(ranks: list[int], rate: float) -> None:
    base = adapter(seed=0)
    updates = round_of(base, ranks)
    result = mean_of(base, updates, max_rank=8).result(rate)
    exact = slow_mean(base, updates, rate)
    singular = [torch.linalg.svdvals(matrix) for matrix in exact.values()]
    best = math.sqrt(sum(float(each[RANK:].square().sum()) for each in singular))
    best /= math.sqrt(sum(float(each.square().sum()) for each in singular))
    assert result.relative_error == pytest.approx(best, rel=1e-5)
    assert relative(products(result.adapter), exact) == pytest.approx(best, rel=1e-5)
    assert result.error_bound == result.relative_error
    change = {layer: exact[layer] - products(base)[layer] for layer in LAYERS}
    size = math.sqrt(sum(float(matrix.square().sum()) for matrix in change.values()))
    whole = math.sqrt(sum(float(matrix.square().sum()) for matrix in exact.values()))
    assert result.update_error == pytest.approx(best * whole / size, rel=1e-5)
    assert {name: tensor.shape for name, tensor in result.adapter.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }


def test_it_is_nearer_to_the_mean_product_than_averaging_a_and_b_apart() -> None:
    base = adapter(seed=0)
    updates = round_of(base, [4] * 5, scale=1.0)
    apart = StreamingMean()
    for _, delta, weight in updates:
        apart.add(delta, weight)
    exact = slow_mean(base, updates)
    plain = relative(products(apply_server_update(base, apart.result(), 1.0)), exact)
    assert mean_of(base, updates).result().relative_error < plain


def test_one_update_gives_that_device_s_product() -> None:
    base = adapter(seed=0)
    updates = round_of(base, [4])
    result = mean_of(base, updates).result()
    assert result.relative_error <= 1e-12
    assert relative(products(result.adapter), products(moved(base, updates[0][1]))) <= 1e-6


def test_the_order_of_devices_does_not_matter() -> None:
    base = adapter(seed=0)
    updates = round_of(base, [4, 2, 4, 8])
    reference = mean_of(base, updates, max_rank=8).result()
    for order in itertools.permutations(updates):
        other = mean_of(base, list(order), max_rank=8).result()
        for name, tensor in reference.adapter.items():
            torch.testing.assert_close(other.adapter[name], tensor, rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(6, 30), st.integers(8, 16), st.integers(0, 2**31))
def test_a_small_stack_errs_by_about_what_it_reports_and_never_more_than_its_bound(
    count: int, stack: int, seed: int
) -> None:
    base = adapter(seed=seed)
    updates = round_of(base, [4] * count, scale=0.5)
    result = mean_of(base, updates, max_stack_rank=stack).result()
    error = relative(products(result.adapter), slow_mean(base, updates))
    assert error <= result.error_bound * (1 + 1e-5)
    assert error / 2 <= result.relative_error <= 2 * error
    assert result.relative_error < result.error_bound


def test_updates_of_zero_give_the_base_back_bit_for_bit() -> None:
    base = adapter(seed=0)
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    result = mean_of(base, [(base, zero, 1.0)] * 20).result()
    assert all(torch.equal(result.adapter[name], base[name]) for name in base)
    assert (result.relative_error, result.update_error) == (0.0, 0.0)


def test_spare_components_can_still_learn() -> None:
    """A fresh adapter has B = 0; a device that changed one column of it leaves a product of rank one."""
    base = adapter(seed=0)
    for layer in LAYERS:
        base[f"{layer}.lora_B.weight"].zero_()
    delta = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    for layer in LAYERS:
        delta[f"{layer}.lora_B.weight"][:, 0] = 1.0
    result = mean_of(base, [(base, delta, 1.0)]).result()
    assert relative(products(result.adapter), products(moved(base, delta))) <= 1e-6
    for layer in LAYERS:
        rows = result.adapter[f"{layer}.lora_A.weight"].double()
        columns = result.adapter[f"{layer}.lora_B.weight"]
        assert bool((rows.norm(dim=1) > 0.1).all())
        assert float(columns[:, 1:].abs().max()) == 0.0
        assert torch.linalg.matrix_rank(rows) == RANK


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_a_device_of_another_rank_starts_from_the_base_s_components(rank: int) -> None:
    base = adapter(seed=0)
    start = at_rank(base, rank, seed=5)
    kept = min(rank, RANK)
    for layer in LAYERS:
        left, right = base[f"{layer}.lora_B.weight"][:, :kept], base[f"{layer}.lora_A.weight"][:kept]
        expected = ALPHA / RANK * (left.double() @ right.double())
        torch.testing.assert_close(products(start)[layer], expected, rtol=1e-5, atol=1e-5)
        assert start[f"{layer}.lora_A.weight"].shape[0] == rank
        assert bool((start[f"{layer}.lora_A.weight"].norm(dim=1) > 0).all())
    again = at_rank(base, rank, seed=5)
    assert all(torch.equal(again[name], start[name]) for name in start)
    if rank == RANK:
        assert all(torch.equal(base[name], start[name]) for name in start)


def test_an_update_of_a_rank_that_is_not_allowed_is_refused_and_leaves_no_trace() -> None:
    base = adapter(seed=0)
    mean = ProductMean(base, max_rank=8)
    with pytest.raises(UpdateRefused, match=r"rank of the update: expected one in 1..8, got \[9\]") as refusal:
        mean.add(adapter(9, seed=1), 1.0)
    assert refusal.value.code == "wrong_tensor_shape"
    mixed = adapter(4, seed=1) | {"q.lora_A.weight": torch.zeros(2, 10)}
    with pytest.raises(UpdateRefused, match=r"got \[2, 4\]"):
        mean.add(mixed, 1.0)
    with pytest.raises(UpdateRefused, match=r"shape of q.lora_B.weight: expected \[12, 2\], got \[12, 3\]"):
        mean.add(adapter(2, seed=1) | {"q.lora_B.weight": torch.zeros(12, 3)}, 1.0)
    with pytest.raises(UpdateRefused, match="expected finite values"):
        mean.add(adapter(2, seed=1, scale=math.inf), 1.0)
    assert mean.num_updates == 0
    with pytest.raises(UpdateRefused, match=r"expected \[4, 14\], got \[2, 14\]"):
        ProductMean(base).add(adapter(2, seed=1), 1.0)
    with pytest.raises(ValueError, match="at least one update"):
        mean.result()
    assert update_rank(adapter(3, seed=1), max_rank=3) == 3


def test_what_is_no_lora_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q\.lora_B\.weight, q\.norm without a partner"):
        lora_pairs({"q.lora_B.weight": torch.zeros(3, 2), "q.norm": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"got \[3, 2\] and \[1, 4\]"):
        lora_pairs({"q.lora_B.weight": torch.zeros(3, 2), "q.lora_A.weight": torch.zeros(1, 4)})
    with pytest.raises(ValueError, match=r"one rank, got \[2, 4\]"):
        ProductMean(adapter(seed=0) | {"q.lora_A.weight": torch.zeros(2, 10), "q.lora_B.weight": torch.zeros(12, 2)})
    with pytest.raises(ValueError, match="rank of at least 1, got 0"):
        at_rank(adapter(seed=0), 0, seed=0)


def test_the_inputs_are_not_changed_nor_kept() -> None:
    base = adapter(seed=0)
    updates = round_of(base, [4, 4])
    copies = [{name: tensor.clone() for name, tensor in delta.items()} for _, delta, _ in updates]
    mean = mean_of(base, updates)
    for (_, delta, _), copied in zip(updates, copies, strict=True):
        for name, tensor in delta.items():
            assert torch.equal(tensor, copied[name])
            tensor.zero_()
    reference = mean_of(base, [(base, copied, weight) for copied, (_, _, weight) in zip(copies, updates, strict=True)])
    for name, tensor in mean.result().adapter.items():
        assert torch.equal(tensor, reference.result().adapter[name])


def test_ordering_keeps_the_products_and_makes_the_first_components_the_best_cut() -> None:
    """Against the singular values of the full matrices (Eckart and Young)."""
    base = adapter(seed=21)
    ordered = by_singular_values(base)
    assert relative(products(ordered), products(base)) <= 1e-6
    for rank in range(1, RANK):
        cut, plain = products(at_rank(ordered, rank, seed=0)), products(at_rank(base, rank, seed=0))
        for layer, whole in products(base).items():
            singular = torch.linalg.svdvals(whole)
            best = float(torch.linalg.vector_norm(singular[rank:]))
            assert float(torch.linalg.matrix_norm(whole - cut[layer])) == pytest.approx(best, rel=1e-5)
            assert float(torch.linalg.matrix_norm(whole - plain[layer])) > 1.01 * best
    assert relative(products(resized(base, 2, seed=0)), products(at_rank(ordered, 2, seed=0))) <= 1e-6
    assert all(torch.equal(tensor, base[name]) for name, tensor in resized(base, RANK, seed=0).items())


def test_ordering_keeps_what_can_still_learn() -> None:
    """An untrained adapter as it is; in a half-trained one a component without a product keeps its row of A."""
    fresh = {name: tensor * ("lora_A" in name) for name, tensor in adapter(seed=22).items()}
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in by_singular_values(fresh).items())
    half = adapter(seed=23)
    for left in lora_pairs(half):
        half[left][:, 2:] = 0
    ordered = by_singular_values(half)
    assert relative(products(ordered), products(half)) <= 1e-6
    for left, right in lora_pairs(ordered).items():
        assert not ordered[left][:, 2:].any()
        assert (torch.linalg.vector_norm(ordered[right], dim=1) > 0.1).all()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_the_cut_hid_from_a_device_is_not_forgotten(rank: int) -> None:
    """A device of a lower rank that learns nothing changes nothing, though its own product lacks most of theta's."""
    base = by_singular_values(adapter(seed=24))
    mean = ProductMean(base, max_rank=RANK)
    start = at_rank(base, rank, seed=0)
    assert relative(products(start), products(base)) > 0.1
    mean.add({name: torch.zeros_like(tensor) for name, tensor in start.items()}, 3.0, rank=rank)
    assert all(torch.equal(tensor, base[name]) for name, tensor in mean.result().adapter.items())
