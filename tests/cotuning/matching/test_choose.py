"""What every matching promises, for each of them; and what a name stands for."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cotuning.alignment import align
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.folding import FoldPair, fold_pair
from cotuning.heads import Head
from cotuning.matching.choose import choose_matching
from cotuning.matching.interface import Matching, MatchingName, Reading, by_rows
from cotuning.mutual_loss import mutual_loss
from tests.cotuning.matching.readings import KIND_A, KIND_B, RESPONSES, padded, pair, reading
from tests.cotuning.trained_tokenizers import table_of, trained

RIVALS = ("uld", "gold", "mined_dtw", "alm")
TEACHING = ("fold", *RIVALS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def matching(name: MatchingName, *, kinds: tuple[str, str] = (KIND_A, KIND_B), **options: Any) -> Matching:
    return choose_matching(name, table_of(kinds[0]), table_of(kinds[1]), the_fold(kinds), **options)


def the_fold(kinds: tuple[str, str] = (KIND_A, KIND_B)) -> FoldPair:
    return fold_pair(trained(kinds[0]), table_of(kinds[0]), trained(kinds[1]), table_of(kinds[1]))


def losses(match: Matching, a: Reading, b: Reading) -> tuple[Tensor, Tensor]:
    lessons = match(a, b)
    found = tuple(lesson.loss() for lesson in lessons)
    assert found[0] is not None
    assert found[1] is not None
    return found[0], found[1]


@pytest.mark.parametrize("name", TEACHING)
def test_each_side_gets_its_own_gradient_and_the_teacher_none(name: MatchingName) -> None:
    a, b = pair(grad=True)
    for own, other, place in ((a, b, 0), (b, a, 1)):
        loss = losses(matching(name), a, b)[place]
        tensors = (own.hidden_BTD, own.head.weight_VD, other.hidden_BTD, other.head.weight_VD)
        grads = torch.autograd.grad(loss, tensors, allow_unused=True)
        assert grads[0] is not None
        assert grads[1] is not None
        assert bool(grads[0].any())
        assert grads[2:] == (None, None)


@pytest.mark.parametrize("name", TEACHING)
def test_only_positions_before_response_tokens_are_read(name: MatchingName) -> None:
    """The causal shift: the position before the response speaks, the last token's own position does not."""
    a, b = pair(grad=True)
    for place, side in enumerate((a, b)):
        (grad_BTD,) = torch.autograd.grad(losses(matching(name), a, b)[place], side.hidden_BTD)
        predicts_BT = torch.zeros_like(side.batch.labels_BT, dtype=torch.bool)
        predicts_BT[:, :-1] = side.batch.labels_BT[:, 1:] != -100
        touched_BT = grad_BTD.abs().sum(-1) > 0
        assert not bool((touched_BT & ~predicts_BT).any())
        first_B = predicts_BT.long().argmax(1)
        if name not in ("gold", "alm"):  # those may have a first span without a slope
            assert bool(touched_BT[torch.arange(len(RESPONSES)), first_B].all())


@pytest.mark.parametrize("name", TEACHING)
def test_states_read_one_position_too_late_give_another_loss(name: MatchingName) -> None:
    a, b = pair()
    late = replace(a, hidden_BTD=a.hidden_BTD.roll(1, dims=1))
    right, wrong = losses(matching(name), a, b), losses(matching(name), late, b)
    assert abs(float(right[0] - wrong[0])) > 1e-4
    assert abs(float(right[1] - wrong[1])) > 1e-4


@pytest.mark.parametrize("name", TEACHING)
def test_padding_changes_nothing(name: MatchingName) -> None:
    a, b = pair()
    expected = losses(matching(name), a, b)
    got = losses(matching(name), padded(a, 5), padded(b, 2))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", TEACHING)
def test_swapping_the_sides_swaps_the_losses(name: MatchingName) -> None:
    a, b = pair()
    there = losses(matching(name), a, b)
    back = losses(matching(name, kinds=(KIND_B, KIND_A)), b, a)
    torch.testing.assert_close(back[::-1], there, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_gradients_by_finite_differences(name: MatchingName, divergence: str) -> None:
    a, b = pair(scale=1.0, responses=RESPONSES[2:])
    match = matching(name, temperature=1.5, divergence=divergence, jsd_beta=0.3)
    # Through a few numbers: all hidden states would be slow, and a wrong slope shows in any direction.
    generator = torch.Generator().manual_seed(3)
    hidden_ways = torch.randn(4, *a.hidden_BTD.shape, generator=generator, dtype=torch.float64)
    head_ways = torch.randn(2, *a.head.weight_VD.shape, generator=generator, dtype=torch.float64)

    def loss_at(shift: Tensor, head_shift: Tensor) -> Tensor:
        hidden_BTD = a.hidden_BTD + torch.einsum("w,wbtd->btd", shift, hidden_ways)
        weight_VD = a.head.weight_VD + torch.einsum("w,wvd->vd", head_shift, head_ways)
        moved = replace(a, hidden_BTD=hidden_BTD, head=Head(weight_VD, a.head.num_tokens))
        return losses(match, moved, b)[0]

    inputs = tuple(torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in (4, 2))
    assert torch.autograd.gradcheck(loss_at, inputs, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", ["fold", "uld", "gold", "alm"])
def test_equal_models_have_nothing_to_teach(name: MatchingName) -> None:
    """Not `mined_dtw`: a cross-entropy is not zero for equal models."""
    a = reading(KIND_A, seed=1)
    got = losses(matching(name, kinds=(KIND_A, KIND_A)), a, a)
    torch.testing.assert_close(torch.stack(got), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TEACHING)
def test_a_side_that_does_not_learn_has_no_term(name: MatchingName) -> None:
    a, b = pair(grad=True)
    lesson_a, lesson_b = matching(name)(replace(a, learns=False), b)
    assert lesson_a.loss() is None
    assert lesson_b.loss() is not None


@pytest.mark.parametrize("name", TEACHING)
def test_no_rows_cost_nothing_and_can_be_passed_back(name: MatchingName) -> None:
    a, b = pair(grad=True, responses=())
    for loss in losses(matching(name), a, b):
        loss.backward()
        assert loss.item() == 0.0


@pytest.mark.parametrize("name", ["fold", "gold", "alm"])
def test_other_responses_are_refused(name: MatchingName) -> None:
    a, b = pair()
    with pytest.raises(ValueError, match="expected the same responses on both sides; rows \\[0, 1\\] differ"):
        matching(name)(a, reading(KIND_B, seed=2, dim=4, responses=(RESPONSES[1], RESPONSES[0], RESPONSES[2])))
    assert matching(name)(a, b)[0].loss() is not None


def test_the_fold_is_the_mutual_loss_bit_for_bit() -> None:
    a, b = pair(grad=True)
    spans = align(a.batch, b.batch)
    rows = a.hidden_BTD[spans.sample_S, spans.row_a_S], b.hidden_BTD[spans.sample_S, spans.row_b_S]
    options: dict[str, Any] = {"temperature": 1.7, "divergence": "jsd", "jsd_beta": 0.2}
    expected = mutual_loss(rows[0], a.head, rows[1], b.head, the_fold(), **options)
    got = losses(matching("fold", **options), a, b)
    for one, other, side in zip(got, expected, (a, b), strict=True):
        assert torch.equal(one, other)
        grads = [torch.autograd.grad(loss, side.hidden_BTD)[0] for loss in (one, other)]
        assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("likelihood", [0.0, 0.3])
def test_the_fold_forms_the_cross_entropy_in_the_same_pass_where_it_is_asked_to(likelihood: float) -> None:
    a, b = pair(grad=True)
    match = matching("fold", temperature=1.7, span_likelihood_weight=likelihood)
    joint = match(replace(a, joint_weight=0.4), replace(b, joint_weight=2.5))
    for lesson, apart, side, weight in zip(joint, match(a, b), (a, b), (0.4, 2.5), strict=True):
        tokens = response_tokens(side.batch)
        mean, _ = cross_entropy(side.hidden_BTD[tokens.sample_N, tokens.position_N], side.head, tokens.target_N)
        expected = mean + weight * apart.terms["kl"]
        assert lesson.joint is not None
        torch.testing.assert_close(lesson.joint, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(lesson.metrics["ce"], mean.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(lesson.metrics["kl"], apart.terms["kl"].detach(), rtol=1e-12, atol=0)
        assert lesson.terms.keys() == apart.terms.keys() - {"kl"}
        tensors = (side.hidden_BTD, side.head.weight_VD)
        torch.testing.assert_close(
            torch.autograd.grad(lesson.joint, tensors), torch.autograd.grad(expected, tensors), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("learns", [(False, False), (True, False), (False, True)])
def test_a_side_that_does_not_learn_keeps_a_cross_entropy_of_its_own(learns: tuple[bool, bool]) -> None:
    sides = [replace(side, learns=each, joint_weight=float(each)) for side, each in zip(pair(), learns, strict=True)]
    for lesson, each in zip(matching("fold")(*sides), learns, strict=True):
        assert lesson.joint is None
        assert (lesson.loss() is not None) == each


def test_ce_only_teaches_nothing() -> None:
    for lesson in matching("ce_only")(*pair()):
        assert lesson.loss() is None
        assert not lesson.terms
        assert not lesson.metrics


def test_the_likelihood_term_is_added_at_its_weight() -> None:
    a, b = pair()
    plain, both = matching("fold")(a, b), matching("fold", span_likelihood_weight=0.3)(a, b)
    for one, two in zip(plain, both, strict=True):
        term = two.terms["span_likelihood"]
        assert torch.equal(two.terms["kl"], one.terms["kl"])
        loss = two.loss()
        assert loss is not None
        assert loss.item() == pytest.approx(one.terms["kl"].item() + 0.3 * term.item(), rel=1e-12)
        assert term.item() > 0


@pytest.mark.parametrize(("name", "weight"), [("gold", 0.1), ("ce_only", 1.0), ("fold", -0.1)])
def test_a_likelihood_weight_that_has_no_place_is_refused(name: MatchingName, weight: float) -> None:
    with pytest.raises(ValueError, match=f"expected span_likelihood_weight 0 .* got {weight} beside '{name}'"):
        matching(name, span_likelihood_weight=weight)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"expected a matching of {', '.join(get_args(MatchingName))}, got 'dtw'"):
        matching("dtw")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RIVALS)
def test_a_temperature_that_is_not_positive_is_refused(name: MatchingName) -> None:
    with pytest.raises(ValueError, match="expected a temperature above 0, got 0"):
        matching(name, temperature=0.0)(*pair())


def test_the_number_of_rows_at_once_changes_neither_values_nor_slopes() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for rows_at_once in (1, 3, 100):
        values_N = by_rows(lambda x_ND: x_ND.exp().sum(1), x, rows_at_once=rows_at_once)
        results.append((values_N.detach(), torch.autograd.grad(values_N.square().sum(), x)[0]))
    for values_N, grad in results[1:]:
        torch.testing.assert_close((values_N, grad), results[0])
