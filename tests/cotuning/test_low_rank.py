"""Thin factors: products of low rank, cut and summed, against the full matrices."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotuning.low_rank import ProductSum, product_norm, truncate_product


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PROBES = random(15, 400, seed=9)
sizes = st.integers(1, 12)


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(0, 2**31))
def test_a_cut_is_the_best_of_its_rank(outputs: int, inputs: int, inner: int, rank: int, seed: int) -> None:
    """Against the singular values of the full matrix, which only a test may form."""
    left, right = random(outputs, inner, seed=seed), random(inner, inputs, seed=seed + 1)
    cut = truncate_product(left, right, rank)
    full = left @ right
    singular = torch.linalg.svdvals(full)
    assert cut.left_OK.shape == (outputs, rank)
    assert cut.right_KI.shape == (rank, inputs)
    assert cut.error == pytest.approx(float(singular[rank:].norm()), abs=1e-10)
    assert cut.norm == pytest.approx(float(full.norm()), rel=1e-10)
    assert float((cut.left_OK @ cut.right_KI - full).norm()) == pytest.approx(cut.error, abs=1e-9)
    assert product_norm(left, right) == pytest.approx(float(full.norm()), rel=1e-10)
    torch.testing.assert_close(cut.left_OK.norm(dim=0), cut.right_KI.norm(dim=1), atol=1e-9, rtol=1e-6)
    norms = cut.right_KI.norm(dim=1)
    assert bool((norms[1:] <= norms[:-1] + 1e-9).all())


def test_the_factors_do_not_depend_on_how_the_product_was_written() -> None:
    left, right, mix = random(9, 3), random(3, 7, seed=1), random(3, 3, seed=2)
    first = truncate_product(left, right, 2)
    second = truncate_product(-left @ mix, -torch.linalg.inv(mix) @ right, 2)
    torch.testing.assert_close(first.left_OK, second.left_OK)
    torch.testing.assert_close(first.right_KI, second.right_KI)


def test_factors_that_do_not_fit_are_refused_with_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"got \[4, 2\] and \[3, 5\] and 1"):
        truncate_product(random(4, 2), random(3, 5), 1)
    with pytest.raises(ValueError, match=r"at least 1, got \[4, 2\] and \[2, 5\] and 0"):
        truncate_product(random(4, 2), random(2, 5), 0)


def terms(count: int, rank: int = 2, seed: int = 0) -> list[tuple[Tensor, Tensor, float]]:
    return [
        (random(20, rank, seed=seed + 2 * place), random(rank, 15, seed=seed + 2 * place + 1), 1.0 + place)
        for place in range(count)
    ]


def summed(max_rank: int, parts: list[tuple[Tensor, Tensor, float]]) -> tuple[ProductSum, Tensor]:
    running = ProductSum(max_rank, PROBES)
    for left, right, weight in parts:
        running.add(left, right, weight)
        assert running.rank <= max_rank
    left, right = running.factors()
    return running, left @ right


def slow_sum(parts: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    total = torch.zeros(20, 15, dtype=torch.float64)
    for left, right, weight in parts:
        for place in range(left.shape[1]):
            total += weight * torch.outer(left[:, place], right[place])
    return total


def test_the_sum_is_exact_within_its_bound_and_in_any_order() -> None:
    parts = terms(4)
    expected = slow_sum(parts)
    for order in itertools.permutations(parts):
        running, total = summed(8, list(order))
        assert running.error == 0.0
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 20), st.sampled_from([2, 4, 7, 10]), st.integers(0, 2**31))
def test_compression_never_errs_by_more_than_it_says(count: int, max_rank: int, seed: int) -> None:
    parts = terms(count, rank=1, seed=seed)
    running, total = summed(max_rank, parts)
    assert float((total - slow_sum(parts)).norm()) <= running.error + 1e-9
    _, backwards = summed(max_rank, parts[::-1])
    assert float((total - backwards).norm()) <= running.error + summed(max_rank, parts[::-1])[0].error + 1e-9
    assert (running.error > 0) == (count > max_rank)
    exactly_lost = (slow_sum(parts) - total) @ PROBES
    torch.testing.assert_close(running.lost(), exactly_lost, rtol=1e-9, atol=1e-9)
    if running.error > 0:
        error = float((total - slow_sum(parts)).norm())
        assert float(running.lost().norm()) / 400**0.5 == pytest.approx(error, rel=0.25)


def test_terms_of_one_subspace_are_summed_exactly_by_a_small_stack() -> None:
    left = random(20, 2)
    parts = [(left, random(2, 15, seed=seed), 1.0) for seed in range(30)]
    running, total = summed(6, parts)
    assert running.error < 1e-9
    torch.testing.assert_close(total, slow_sum(parts))


def test_a_stack_of_the_matrix_s_own_size_loses_nothing() -> None:
    """15 inputs: half of 40 holds any matrix of 15 columns."""
    parts = terms(40)
    running, total = summed(40, parts)
    assert running.error < 1e-9
    torch.testing.assert_close(total, slow_sum(parts))


def test_the_terms_are_copied() -> None:
    left, right = random(20, 2), random(2, 15)
    running = ProductSum(8, PROBES)
    running.add(left, right, 2.0)
    expected = 2 * left @ right
    left.zero_()
    right.zero_()
    torch.testing.assert_close(torch.matmul(*running.factors()), expected)


def test_nothing_and_no_room_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one term"):
        ProductSum(4, PROBES).factors()
    with pytest.raises(ValueError, match="at least rank 2, got 1"):
        ProductSum(1, PROBES)
