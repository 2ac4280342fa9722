import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotuning.adapters import AdapterMismatch
from cotuning.aggregation import (
    GROUP,
    StreamingMean,
    UpdateRefused,
    apply_server_update,
    check_update,
    update_norm,
)

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


def exact_mean(deltas: list[Update], weights: list[float], name: str) -> tuple[np.ndarray, np.ndarray]:
    """numpy's float64 weighted mean, and the most that the module's docstring lets ours differ from it."""
    stacked = np.stack([delta[name].numpy().astype(np.float64) for delta in deltas])
    expected = np.average(stacked, axis=0, weights=weights)
    magnitude = np.average(np.abs(stacked), axis=0, weights=weights)
    return expected, 2.0**-24 * ((GROUP + 3) * magnitude + np.abs(expected))


def assert_within_bound(deltas: list[Update], weights: list[float], result: Update) -> None:
    for name in result:
        expected, bound = exact_mean(deltas, weights, name)
        assert (np.abs(result[name].numpy().astype(np.float64) - expected) <= bound).all(), name


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 100_000), min_size=1, max_size=2 * GROUP + 3),
    st.integers(0, 2**31),
    st.sampled_from([1e-32, 1e-8, 1.0, 1e6, 1e34]),
)
def test_equals_numpys_weighted_mean(weights: list[int], seed: int, scale: float) -> None:
    deltas = updates(len(weights), seed, scale)
    assert_within_bound(deltas, [float(weight) for weight in weights], mean(deltas, [float(w) for w in weights]))


@pytest.mark.parametrize("cancelling", [False, True])
def test_a_thousand_updates_of_wildly_different_weights_and_sizes(cancelling: bool) -> None:
    """Weights from 1e-3 to 1e9, sizes over twelve decades; and where what comes cancels nearly all that came before."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.rand(1_000, 2, generator=generator, dtype=torch.float64)
    weights = (10 ** (12 * draws[:, 0] - 3)).tolist()
    scales = (10 ** (12 * draws[:, 1] - 6)).tolist()
    deltas = [updates(1, seed, scale)[0] for seed, scale in enumerate(scales)]
    if cancelling:
        for place in range(1, 1_000, 2):
            weights[place] = weights[place - 1]
            deltas[place] = {name: -tensor * (1 + 1e-4) for name, tensor in deltas[place - 1].items()}
    assert_within_bound(deltas, weights, mean(deltas, weights))


@pytest.mark.parametrize("size", [1, 2**17 - 1, 2**17, 2**17 + 5, 3 * 2**17])
def test_a_sum_that_float32_holds_is_exact_whatever_the_blocks(size: int) -> None:
    """Whole numbers below 2^24, in every partial sum; weights that are powers of two times the first."""
    generator = torch.Generator().manual_seed(size)
    deltas = [{"a": torch.randint(-1000, 1000, (size,), generator=generator).float()} for _ in range(GROUP + 2)]
    weights = [3.0 * 2 ** (place % 4) for place in range(GROUP + 2)]
    total = sum(delta["a"].double() * weight for delta, weight in zip(deltas, weights, strict=True))
    assert torch.equal(mean(deltas, weights)["a"], (total / sum(weights)).float())


def test_tensors_in_one_piece_and_apart_give_the_same_bits() -> None:
    """As a file is read, with other tensors around them, in another order, and transposed."""
    deltas, weights = updates(GROUP + 3, seed=5), [float(3 + place) for place in range(GROUP + 3)]
    reference = mean(deltas, weights)
    for order, extra in ((["a", "b"], 0), (["a", "b"], 3), (["b", "a"], 2)):
        pieces = []
        for delta in deltas:
            whole = torch.cat([torch.zeros(extra), *(delta[name].reshape(-1) for name in order), torch.ones(extra)])
            sizes = [extra, *(delta[name].numel() for name in order), extra]
            views = dict(zip(["", *order, "-"], whole.split(sizes), strict=True))
            pieces.append({name: views[name].view(delta[name].shape) for name in ("a", "b")})
        result = mean(pieces, weights)
        assert all(torch.equal(result[name], reference[name]) for name in reference)
    strided = [{"a": delta["a"].T.contiguous().T, "b": delta["b"]} for delta in deltas]
    assert torch.equal(mean(strided, weights)["a"], reference["a"])


def test_tensors_that_overlap_or_leave_gaps_are_not_taken_for_one_piece() -> None:
    memory = torch.arange(40.0)
    for delta in (
        {"a": memory[:12].view(3, 4), "b": memory[11:16]},
        {"a": memory[:12].view(3, 4), "b": memory[13:18]},
        {"a": memory[:24:2].view(3, 4), "b": memory[24:29]},
        {"a": memory[:12].view(3, 4), "b": torch.empty(0)},
    ):
        result = mean([delta], [2.0])
        assert all(torch.equal(result[name], delta[name]) for name in delta)


def test_by_hand() -> None:
    deltas = [{"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([4.0, -2.0])}]
    assert mean(deltas, [2.0, 1.0])["a"].tolist() == [2.0, pytest.approx(-2 / 3)]


def test_the_order_of_devices_does_not_matter() -> None:
    deltas, weights = updates(5), [3.0, 1.0, 7.0, 2.0, 11.0]
    reference = mean(deltas, weights)
    for order in itertools.permutations(range(5)):
        other = mean([deltas[place] for place in order], [weights[place] for place in order])
        for name in reference:
            _, bound = exact_mean(deltas, weights, name)
            assert (np.abs(other[name].double().numpy() - reference[name].double().numpy()) <= 2 * bound).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=GROUP + 6))
def test_equal_updates_give_that_update(weights: list[float]) -> None:
    delta = updates(1)[0]
    result = mean([delta] * len(weights), weights)
    for name in delta:
        torch.testing.assert_close(result[name], delta[name], rtol=2.0**-24 * (GROUP + 4), atol=0)


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


@pytest.mark.parametrize("bad", [math.nan, 3e38])
@pytest.mark.parametrize("before", [0, 1, GROUP - 1, GROUP])
def test_a_refused_update_leaves_no_trace_anywhere_in_a_group(before: int, bad: float) -> None:
    """The same bits as if it had never come; 3e38 is finite, and over the limit."""
    deltas, weights = updates(GROUP + 4, seed=8), [float(1 + place) for place in range(GROUP + 4)]
    running = StreamingMean(max_norm=1e3)
    for place, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        if place == before:
            with pytest.raises(UpdateRefused):
                running.add({"a": torch.full((3, 4), bad), "b": delta["b"]}, 7.0)
        running.add(delta, weight)
    reference = mean(deltas, weights)
    assert all(torch.equal(running.result()[name], reference[name]) for name in reference)
    assert running.weight == sum(weights)


def test_updates_that_float32_cannot_sum_are_summed_in_float64() -> None:
    """Finite values whose float32 sum overflows, and others below float32's normal numbers, mixed with plain ones."""
    big, small = {"a": torch.full((2,), 3e38)}, {"a": torch.tensor([1e-44, -3e-42])}
    assert mean([big] * 5, [1.0, 2.0, 3.0, 1e6, 1.0])["a"].tolist() == big["a"].tolist()
    assert mean([small] * 3, [1.0, 1e-6, 5.0])["a"].tolist() == small["a"].tolist()
    plain = {"a": torch.tensor([1.0, 2.0])}
    expected = (torch.tensor([1.0, 2.0], dtype=torch.float64) * 3 + big["a"].double()) / 4
    assert torch.equal(mean([plain, big, plain, plain], [1.0] * 4)["a"], expected.float())


def test_the_norm_of_what_was_counted_is_returned() -> None:
    for scale in (0.0, 1e-30, 1.0, 1e25):
        delta = updates(1, seed=3, scale=scale)[0]
        assert StreamingMean().add(delta, 5.0) == pytest.approx(update_norm(delta), rel=1e-6)
        assert check_update(delta, delta) == pytest.approx(update_norm(delta), rel=1e-6)


def test_the_mean_can_be_read_between_updates() -> None:
    deltas, weights = updates(5, seed=9), [1.0, 4.0, 2.0, 9.0, 3.0]
    running = StreamingMean()
    for place, (delta, weight) in enumerate(zip(deltas, weights, strict=True), start=1):
        running.add(delta, weight)
        result = running.result()
        assert_within_bound(deltas[:place], weights[:place], result)
        for tensor in result.values():
            tensor.zero_()
    assert_within_bound(deltas, weights, running.result())


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
