"""ALM against products of token probabilities, and its two-event divergence at its ends."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotuning.divergences import Divergence
from cotuning.matching.interface import Reading
from cotuning.matching.likelihood import binary_divergence, span_likelihood
from tests.cotuning.matching.readings import Token, pair, probs_before, reading, span_groups
from tests.cotuning.matching.test_gold import slow_divergence


def likelihood(one: Reading, row: int, group: list[Token]) -> float:
    return math.prod(probs_before(one, row, token)[token.index] for token in group)


@pytest.mark.parametrize("spans", ["all", "several_tokens"])
@pytest.mark.parametrize(("divergence", "temperature"), [("forward_kl", 1.0), ("reverse_kl", 5.0), ("jsd", 20.0)])
def test_the_loss_is_the_loop_over_spans(spans: str, divergence: Divergence, temperature: float) -> None:
    a, b = pair(scale=1.0)
    values = []
    for row, group_a, group_b in span_groups(a, b):
        if spans == "several_tokens" and len(group_a) == len(group_b) == 1:
            continue
        student, teacher = (likelihood(*side) ** (1 / temperature) for side in ((a, row, group_a), (b, row, group_b)))
        values.append(slow_divergence([teacher, 1 - teacher], [student, 1 - student], divergence, 0.4))
    direction = span_likelihood(
        temperature=temperature,
        divergence=divergence,
        jsd_beta=0.4,
        spans=spans,
        name="x",  # type: ignore[arg-type]
    )
    assert 0 < len(values) < len(span_groups(a, b)) + (spans == "all")
    assert float(direction(a, b).terms["x"]) == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_a_hand_worked_case() -> None:
    """Teacher 3/4, student 1/2: 3/4 log(3/2) + 1/4 log(1/2)."""
    got = binary_divergence(torch.tensor([0.5]).log(), torch.tensor([0.75]).log())
    assert float(got) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


@given(st.floats(-80, 0), st.floats(-80, 0), st.floats(1, 100))
def test_it_is_never_negative_and_its_gradient_never_nan(student: float, teacher: float, temperature: float) -> None:
    """In float32, from certainty to what no one would have said."""
    student_S = torch.tensor([student], requires_grad=True)
    loss = binary_divergence(student_S, torch.tensor([teacher]), temperature=temperature).sum()
    loss.backward()
    assert float(loss.detach()) >= -1e-6
    assert student_S.grad is not None
    assert bool(student_S.grad.isfinite().all())


def test_equal_likelihoods_cost_nothing() -> None:
    logs = torch.tensor([-1e-9, -0.1, -0.7, -3.0, -60.0])
    assert binary_divergence(logs, logs).tolist() == [0.0] * 5


def test_a_temperature_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature above 0, got -1"):
        binary_divergence(torch.zeros(1), torch.zeros(1), temperature=-1)


def test_no_spans_give_zero_with_a_backward_pass() -> None:
    one = reading("byte_level", seed=0, responses=(), grad=True)
    loss = span_likelihood(temperature=1.0)(one, one.detached()).terms["alm"]
    loss.backward()
    assert loss.item() == 0.0
