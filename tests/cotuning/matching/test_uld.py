"""ULD against a loop over positions and ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotuning.matching.interface import both_ways
from cotuning.matching.uld import position_pairs, sorted_l1, uld
from tests.cotuning.matching.readings import KIND_A, KIND_B, RESPONSES, pair, probs_before, reading, tokens_of

numbers = st.lists(st.floats(0, 1), min_size=1, max_size=6)


def slow_sorted_l1(p: list[float], q: list[float]) -> float:
    width = max(len(p), len(q))
    p, q = (sorted(each, reverse=True) + [0.0] * (width - len(each)) for each in (p, q))
    return sum(abs(x - y) for x, y in zip(p, q, strict=True))


@given(numbers, numbers)
def test_sorted_l1_is_the_loop_over_ranks_and_does_not_care_for_order(p: list[float], q: list[float]) -> None:
    got = sorted_l1(torch.tensor([p], dtype=torch.float64), torch.tensor([q], dtype=torch.float64))
    assert float(got) == pytest.approx(slow_sorted_l1(p, q), abs=1e-12)
    turned = sorted_l1(torch.tensor([q[::-1]], dtype=torch.float64), torch.tensor([p], dtype=torch.float64))
    assert float(turned) == pytest.approx(float(got), abs=1e-12)


def test_a_hand_worked_case() -> None:
    """Sorted (0.7, 0.3, 0) against (0.5, 0.25, 0.25): 0.2 + 0.05 + 0.25."""
    got = sorted_l1(torch.tensor([[0.3, 0.7]]), torch.tensor([[0.25, 0.5, 0.25]]))
    assert float(got) == pytest.approx(0.5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_the_mean_over_positions_up_to_the_shorter_row(temperature: float) -> None:
    a, b = pair()
    values = []
    for row, response in enumerate(RESPONSES):
        tokens = zip(tokens_of(a, KIND_A, row, response), tokens_of(b, KIND_B, row, response), strict=False)
        for token_a, token_b in tokens:
            values.append(
                slow_sorted_l1(probs_before(a, row, token_a, temperature), probs_before(b, row, token_b, temperature))
            )
    one = uld(temperature=temperature)
    lesson_a, lesson_b = both_ways(one, one)(a, b)
    assert float(lesson_a.terms["uld"]) == pytest.approx(sum(values) / len(values), rel=1e-12)
    assert float(lesson_b.terms["uld"]) == pytest.approx(float(lesson_a.terms["uld"]), rel=1e-12)


def test_pairs_are_the_first_tokens_of_each_row_where_lengths_differ() -> None:
    a, b = pair()
    counts = [
        (len(tokens_of(a, KIND_A, row, text)), len(tokens_of(b, KIND_B, row, text)))
        for row, text in enumerate(RESPONSES)
    ]
    assert any(one != other for one, other in counts), "the case must tell the sides apart"
    tokens_a, tokens_b = position_pairs(a.batch, b.batch)
    for row, (one, other) in enumerate(counts):
        for tokens, side, kind in ((tokens_a, a, KIND_A), (tokens_b, b, KIND_B)):
            expected = [token.position - 1 for token in tokens_of(side, kind, row, RESPONSES[row])]
            assert tokens.position_N[tokens.sample_N == row].tolist() == expected[: min(one, other)]


def test_no_positions_give_zero_with_a_backward_pass() -> None:
    one = reading(KIND_A, seed=0, responses=(), grad=True)
    loss = uld(temperature=1.0)(one, one.detached()).terms["uld"]
    loss.backward()
    assert loss.item() == 0.0
