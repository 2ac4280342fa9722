import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotuning.adapters import AdapterMismatch
from cotuning.aggregation import StreamingMean, UpdateRefused, apply_server_update, check_update, update_norm

Update = dict[str, torch.Tensor]


def updates(count: int, seed: int = 0, scale: float = 1.0) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"a": scale * torch.randn(3, 4, generator=generator), "b": scale * torch.randn(5, generator=generator)}
        for _ in range(count)
    ]


def mean(deltas: list[Update], weights: list[float]) -> Update:
    running = StreamingMean()
    for delta, weight in zip(deltas, weights, strict=True):
        running.add(delta, weight)
    return running.result()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 100_000), min_size=1, max_size=8),
    st.integers(0, 2**31),
    st.sampled_from([1e-8, 1.0, 1e6]),
)
def test_equals_numpys_weighted_mean(weights: list[int], seed: int, scale: float) -> None:
    deltas = updates(len(weights), seed, scale)
    result = mean(deltas, [float(weight) for weight in weights])
    for name in ("a", "b"):
        stacked = np.stack([delta[name].numpy().astype(np.float64) for delta in deltas])
        expected = np.average(stacked, axis=0, weights=weights).astype(np.float32)
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 2**18 - 1, 2**18, 2**18 + 5, 3 * 2**18])
def test_sums_are_plain_float64_sums_bit_for_bit(size: int) -> None:
    """Whatever the blocks in which they are taken; example counts are whole, so that products are exact."""
    generator = torch.Generator().manual_seed(size)
    deltas = [{"a": torch.randn(size, generator=generator)} for _ in range(3)]
    weights = [3.0, 100_003.0, 17.0]
    total = sum(delta["a"].double() * weight for delta, weight in zip(deltas, weights, strict=True))
    assert torch.equal(mean(deltas, weights)["a"], (total / sum(weights)).float())


def test_by_hand() -> None:
    deltas = [{"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([4.0, -2.0])}]
    assert mean(deltas, [2.0, 1.0])["a"].tolist() == [2.0, pytest.approx(-2 / 3)]


def test_the_order_of_devices_does_not_matter() -> None:
    deltas, weights = updates(5), [3.0, 1.0, 7.0, 2.0, 11.0]
    reference = mean(deltas, weights)
    for order in itertools.permutations(range(5)):
        other = mean([deltas[place] for place in order], [weights[place] for place in order])
        for name in reference:
            torch.testing.assert_close(other[name], reference[name], rtol=2e-7, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=6))
def test_equal_updates_give_that_update(weights: list[float]) -> None:
    delta = updates(1)[0]
    result = mean([delta] * len(weights), weights)
    for name in delta:
        torch.testing.assert_close(result[name], delta[name], rtol=1e-7, atol=0)


def test_one_update_is_given_back_bit_for_bit() -> None:
    delta = updates(1, seed=4)[0]
    assert all(torch.equal(mean([delta], [17.0])[name], delta[name]) for name in delta)


def test_the_inputs_are_not_changed_nor_kept() -> None:
    deltas = updates(2)
    copies = [{name: tensor.clone() for name, tensor in delta.items()} for delta in deltas]
    running = StreamingMean()
    for delta, copied in zip(deltas, copies, strict=True):
        running.add(delta, 1.0)
        assert all(torch.equal(delta[name], copied[name]) for name in delta)
    for delta in deltas:
        for tensor in delta.values():
            tensor.zero_()
    assert any(tensor.abs().max() > 0 for tensor in running.result().values())
    assert running.num_updates == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_and_leaves_no_trace(value: float) -> None:
    good, bad = updates(2)
    running = StreamingMean()
    running.add(good, 1.0)
    bad["b"][2] = value
    with pytest.raises(UpdateRefused, match=r"b: expected finite values, got 1 that are not") as refusal:
        running.add(bad, 1.0)
    assert refusal.value.code == "non_finite_values"
    assert running.num_updates == 1
    assert torch.equal(running.result()["a"], good["a"])


def test_wrong_names_shapes_and_dtypes_are_refused_with_both_sides_named() -> None:
    expected = updates(1)[0]
    with pytest.raises(UpdateRefused) as refusal:
        check_update({"a": expected["a"], "c": expected["b"]}, expected)
    assert (refusal.value.code, refusal.value.expected, refusal.value.received) == ("wrong_tensor_names", ["b"], ["c"])
    with pytest.raises(UpdateRefused) as refusal:
        check_update(expected | {"b": torch.zeros(6)}, expected)
    assert (refusal.value.code, refusal.value.expected, refusal.value.received) == ("wrong_tensor_shape", [5], [6])
    with pytest.raises(UpdateRefused) as refusal:
        check_update(expected | {"b": torch.zeros(5, dtype=torch.float16)}, expected)
    assert refusal.value.code == "wrong_tensor_dtype"
    assert refusal.value.expected == "F32"


def test_the_second_update_must_look_like_the_first() -> None:
    running = StreamingMean()
    running.add(updates(1)[0], 1.0)
    with pytest.raises(UpdateRefused, match="1 tensors missing"):
        running.add({"a": torch.zeros(3, 4)}, 1.0)


def test_a_norm_above_the_limit_is_refused() -> None:
    delta = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert update_norm(delta) == 5.0
    check_update(delta, delta, max_norm=5.0)
    with pytest.raises(UpdateRefused, match=r"L2 norm: expected at most 4.9, got 5") as refusal:
        StreamingMean(delta, max_norm=4.9).add(delta, 1.0)
    assert refusal.value.code == "norm_out_of_range"


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_the_norm_is_decided_exactly_where_float32_cannot_tell(scale: float) -> None:
    """Squares of 1e25 overflow float32, of 1e-30 vanish in it."""
    delta = {"a": torch.full((2**18 + 3,), scale), "b": torch.full((2,), scale)}
    norm = math.sqrt(2**18 + 5) * float(torch.tensor(scale))
    assert update_norm(delta) == pytest.approx(norm, rel=1e-12)
    check_update(delta, delta)
    check_update(delta, delta, max_norm=norm * (1 + 1e-9))
    if scale > 1e-20:
        with pytest.raises(UpdateRefused, match="L2 norm"):
            check_update(delta, delta, max_norm=norm * (1 - 1e-9))


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(ValueError, match="expected a weight above 0"):
        StreamingMean().add(updates(1)[0], weight)


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one update"):
        StreamingMean().result()


def test_a_server_update_is_shared_plus_rate_times_mean() -> None:
    shared, delta = updates(2)
    moved = apply_server_update(shared, delta, 0.5)
    assert all(torch.equal(moved[name], shared[name] + 0.5 * delta[name]) for name in shared)
    zero = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
    assert all(torch.equal(apply_server_update(shared, zero, 1.0)[name], shared[name]) for name in shared)
    with pytest.raises(AdapterMismatch):
        apply_server_update(shared, {"a": delta["a"]}, 1.0)
