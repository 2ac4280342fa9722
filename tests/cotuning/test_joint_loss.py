"""One pass for cross-entropy and divergence equals two: in value, in every gradient, for every setting."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotuning.alignment import align
from cotuning.cross_entropy import cross_entropy, response_tokens
from cotuning.encoding import IGNORED_LABEL, EncodedBatch
from cotuning.folding import FoldPair
from cotuning.heads import Head
from cotuning.joint_loss import JointSide, joint_loss, joint_places
from cotuning.mutual_loss import mutual_loss
from tests.cotuning.matching.readings import pair as readings

SPANS, PLACES_A, PLACES_B, DIM_A, DIM_B, VOCAB_A, VOCAB_B, CLASSES = 7, 12, 10, 5, 4, 11, 9, 6
NO_TARGET = 2
"""A span start of side A whose token has no label."""
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def maps(classes: int, seed: int = 0) -> FoldPair:
    """Random maps under which each class has an id on both sides."""
    generator = torch.Generator().manual_seed(seed)
    map_a_V, map_b_V = (
        torch.cat([torch.arange(classes), torch.randint(classes, (size - classes,), generator=generator)])
        for size in (VOCAB_A, VOCAB_B)
    )
    return FoldPair(map_a_V, map_b_V, classes, classes - 2, classes - 1, classes - 2, False, "x")


def in_two_parts() -> FoldPair:
    breaks = [torch.zeros(size, dtype=torch.bool) for size in (VOCAB_A, VOCAB_B)]
    return replace(maps(CLASSES), unspaced=maps(4, seed=1), breaks_a_V=breaks[0], breaks_b_V=breaks[1])


def same_tokenizer() -> FoldPair:
    ids = torch.arange(VOCAB_A)
    return FoldPair(ids, ids, VOCAB_A, 0, 0, VOCAB_A, True, "x")


FOLDS: dict[str, tuple[FoldPair, Tensor | None]] = {
    "fold": (maps(CLASSES), None),
    "two_parts": (in_two_parts(), torch.tensor([True, False, False, True, True, False, False])),
    "same": (same_tokenizer(), None),
}


def tensors(vocab_b: int = VOCAB_B, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden states, weight (two rows more than ids) and bias of both sides; leaves that want gradients."""
    shapes = ((PLACES_A, DIM_A), (VOCAB_A + 2, DIM_A), (VOCAB_A,), (PLACES_B, DIM_B), (vocab_b + 2, DIM_B), (vocab_b,))
    return [random(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def sides(made: list[Tensor], vocab_b: int, *, extras: bool = False, **options: Any) -> tuple[JointSide, JointSide]:
    generator = torch.Generator().manual_seed(9)
    found = []
    for place, (count, vocab) in enumerate(((PLACES_A, VOCAB_A), (PLACES_B, vocab_b))):
        hidden, weight, bias = made[3 * place : 3 * place + 3]
        target_N = torch.randint(0, vocab, (count,), generator=generator)
        if place == 0:
            target_N[NO_TARGET] = IGNORED_LABEL
        head = Head(weight, vocab, bias, 0.7, 3.0) if extras else Head(weight, vocab)
        found.append(JointSide(hidden, head, target_N, **options))
    return replace(found[0], weight=options.get("weight", 0.8)), found[1]


def apart(a: JointSide, b: JointSide, fold: FoldPair, *, num_spans: float | None, **options: Any) -> list[Tensor]:
    """The same objectives by `cross_entropy` and `mutual_loss`."""
    losses = mutual_loss(
        a.hidden_ND[:SPANS], a.head, b.hidden_ND[:SPANS], b.head, fold,
        weight_a=a.weight, weight_b=b.weight, num_spans=num_spans, **options,
    )  # fmt: skip
    found = []
    for side, loss in zip((a, b), losses, strict=True):
        counted = side.target_N >= 0
        mean, _ = cross_entropy(side.hidden_ND[counted], side.head, side.target_N[counted])
        share = 1.0 if side.num_tokens is None else int(counted.sum()) / side.num_tokens
        found.append(mean * share + loss)
    return found


def gradients(losses: list[Tensor], made: list[Tensor]) -> list[Tensor]:
    """Of an uneven sum, so that a mix-up of the two sides shows; zeros where there is none."""
    wanted = [tensor for tensor in made if tensor.requires_grad]
    got = torch.autograd.grad(losses[0] + 1.7 * losses[1], wanted, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(wanted, got, strict=True)]


@pytest.mark.parametrize("kind", FOLDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("extras", [False, True])
def test_equals_the_two_losses_apart(kind: str, divergence: str, temperature: float, extras: bool) -> None:
    """Soft cap, logit scale, bias, padded heads, a fold in two parts, equal tokenizers, an unlabelled start."""
    fold, after_break_S = FOLDS[kind]
    vocab_b = len(fold.map_b_V)
    options: dict[str, Any] = {
        "temperature": temperature, "divergence": divergence, "jsd_beta": 0.3, "num_spans": 5.0,
        "after_break_S": after_break_S,
    }  # fmt: skip
    made = tensors(vocab_b)
    a, b = sides(made, vocab_b, extras=extras, num_tokens=8.0)
    expected = apart(a, b, fold, **options)
    expected_grads = gradients(expected, made)
    for chunk_rows in (3, 128):
        found = joint_loss(a, b, fold, SPANS, chunk_rows=chunk_rows, **options)
        for one, other in zip(found, expected, strict=True):
            assert abs(float((one.loss - other).detach())) <= 1e-12
        for mine, theirs in zip(gradients([each.loss for each in found], made), expected_grads, strict=True):
            assert float((mine - theirs).abs().max()) <= 1e-12


@pytest.mark.parametrize("kind", FOLDS)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_gradients_pass_gradcheck(kind: str, temperature: float) -> None:
    fold, after_break_S = FOLDS[kind]
    vocab_b = len(fold.map_b_V)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        made = [hidden, weight, bias, *(tensor.detach() for tensor in tensors(vocab_b)[3:])]
        a, b = sides(made, vocab_b, extras=True)
        return joint_loss(
            a, b, fold, SPANS, temperature=temperature, divergence="jsd", chunk_rows=4, after_break_S=after_break_S
        )[0].loss

    assert torch.autograd.gradcheck(loss, tuple(tensors(vocab_b)[:3]))


def test_the_parts_are_reported_before_weights() -> None:
    made = tensors()
    a, b = sides(made, VOCAB_B)
    found = joint_loss(a, b, maps(CLASSES), SPANS, temperature=2.0)
    terms = mutual_loss(a.hidden_ND[:SPANS], a.head, b.hidden_ND[:SPANS], b.head, maps(CLASSES), temperature=2.0)
    for side, one, term in zip((a, b), found, terms, strict=True):
        counted = side.target_N >= 0
        mean, _ = cross_entropy(side.hidden_ND[counted], side.head, side.target_N[counted])
        assert one.divergence is not None
        torch.testing.assert_close(
            (one.cross_entropy, one.divergence), (mean.detach(), term.detach()), rtol=1e-12, atol=0
        )
        assert not one.cross_entropy.requires_grad
        assert not one.divergence.requires_grad
        torch.testing.assert_close(one.loss, one.cross_entropy + side.weight * one.divergence, rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", ["both heads", "head a", "side b"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    whole = tensors()
    fold = maps(CLASSES)
    expected = gradients([each.loss for each in joint_loss(*sides(whole, VOCAB_B), fold, SPANS)], whole)
    places = {"both heads": (1, 4), "head a": (1,), "side b": (3, 4, 5)}[frozen]
    made = [tensor.detach().requires_grad_(place not in places) for place, tensor in enumerate(whole)]
    found = joint_loss(*sides(made, VOCAB_B), fold, SPANS)
    kept = [grad for place, grad in enumerate(expected) if place not in places]
    for mine, theirs in zip(gradients([each.loss for each in found], made), kept, strict=True):
        assert torch.equal(mine, theirs)
    assert found[1].loss.requires_grad == (frozen != "side b")


def test_each_loss_reaches_its_own_side_only() -> None:
    made = tensors()
    found = joint_loss(*sides(made, VOCAB_B), maps(CLASSES), SPANS)
    for each, own in zip(found, ((0, 1), (3, 4)), strict=True):
        got = torch.autograd.grad(each.loss, made, allow_unused=True)
        assert tuple(place for place, grad in enumerate(got) if grad is not None) == own


@pytest.mark.parametrize(("weight_a", "weight_b"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_side_of_weight_zero_keeps_its_cross_entropy(weight_a: float, weight_b: float) -> None:
    made = tensors()
    a, b = sides(made, VOCAB_B)
    a, b = replace(a, weight=weight_a), replace(b, weight=weight_b)
    found = joint_loss(a, b, maps(CLASSES), SPANS)
    expected = apart(a, b, maps(CLASSES), num_spans=None)
    assert [each.divergence is None for each in found] == [not weight_a, not weight_b]
    for one, other in zip(found, expected, strict=True):
        assert abs(float((one.loss - other).detach())) <= 1e-12
    for mine, theirs in zip(gradients([each.loss for each in found], made), gradients(expected, made), strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(1, SPANS - 1), st.integers(1, 12), st.sampled_from(DIVERGENCES))
def test_micro_batches_with_the_windows_counts_add_up_to_the_batch(cut: int, chunk_rows: int, divergence: Any) -> None:
    made = tensors()
    a, b = sides(made, VOCAB_B)
    fold = maps(CLASSES)
    options: dict[str, Any] = {"divergence": divergence, "chunk_rows": chunk_rows}
    whole = joint_loss(a, b, fold, SPANS, **options)
    counts = [float((side.target_N >= 0).sum()) for side in (a, b)]

    def part(side: JointSide, rows: slice, num_tokens: float) -> JointSide:
        return replace(side, hidden_ND=side.hidden_ND[rows], target_N=side.target_N[rows], num_tokens=num_tokens)

    options["num_spans"] = SPANS
    first = joint_loss(part(a, slice(cut), counts[0]), part(b, slice(cut), counts[1]), fold, cut, **options)
    rest = slice(cut, None)
    second = joint_loss(part(a, rest, counts[0]), part(b, rest, counts[1]), fold, SPANS - cut, **options)
    for place in (0, 1):
        assert float((first[place].loss + second[place].loss - whole[place].loss).detach().abs()) <= 1e-12


def test_a_tied_head_gets_the_gradient_of_both_its_uses() -> None:
    made = tensors()
    _, b = sides(made, VOCAB_B)
    tokens = torch.arange(PLACES_A) % VOCAB_A

    def tied(joint: bool) -> Tensor:
        weight = made[1]
        a, _ = sides([weight[tokens].tanh(), weight, *made[2:]], VOCAB_B)
        loss = (
            joint_loss(a, b, maps(CLASSES), SPANS)[0].loss if joint else apart(a, b, maps(CLASSES), num_spans=None)[0]
        )
        return torch.autograd.grad(loss, weight)[0]

    assert float((tied(True) - tied(False)).abs().max()) <= 1e-12


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_is_close_and_sums_in_float32(how: str) -> None:
    exact = tensors()
    expected = joint_loss(*sides(exact, VOCAB_B), maps(CLASSES), SPANS)
    expected_grads = gradients([each.loss for each in expected], exact)
    made = tensors(dtype=torch.bfloat16 if how == "bfloat16" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        found = joint_loss(*sides(made, VOCAB_B), maps(CLASSES), SPANS, chunk_rows=3)
    for one, other in zip(found, expected, strict=True):
        assert one.loss.dtype == torch.float32
        assert one.loss.item() == pytest.approx(other.loss.item(), rel=0.02)
    for tensor, mine, theirs in zip(made, gradients([x.loss for x in found], made), expected_grads, strict=True):
        assert mine.dtype == tensor.dtype
        assert float((mine.double() - theirs).abs().max()) <= 0.05 * max(float(theirs.abs().max()), 1e-6)


def test_a_target_of_vanishing_probability_has_a_finite_exact_loss() -> None:
    """Its probability underflows in float32; its cross-entropy is the distance of the logits."""
    weight_VD = torch.tensor([[300.0], [0.0]])
    fold = FoldPair(torch.tensor([0, 1]), torch.tensor([0, 1]), 2, 1, 1, 1, False, "x")
    side = JointSide(torch.ones(1, 1, requires_grad=True), Head(weight_VD, 2), torch.tensor([1]), weight=0.0)
    other = replace(side, hidden_ND=side.hidden_ND.detach(), weight=1.0)
    found = joint_loss(side, other, fold, 1)
    assert found[0].loss.item() == 300.0
    assert torch.autograd.grad(found[0].loss, side.hidden_ND)[0].item() == 300.0


def test_no_graph_when_none_is_wanted_and_one_backward_pass() -> None:
    made = tensors(dtype=torch.float32)
    with torch.no_grad():
        values = joint_loss(*sides(made, VOCAB_B), maps(CLASSES), SPANS)
    assert not values[0].loss.requires_grad
    found = joint_loss(*sides(made, VOCAB_B), maps(CLASSES), SPANS)
    assert torch.equal(found[0].loss.detach(), values[0].loss)
    found[0].loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        found[0].loss.backward()


def test_no_spans_and_no_tokens_are_zero_with_a_graph() -> None:
    made = tensors()
    a, b = sides(made, VOCAB_B)
    only_tokens = joint_loss(a, b, maps(CLASSES), 0)
    assert only_tokens[0].divergence == 0
    assert only_tokens[0].loss.item() == pytest.approx(only_tokens[0].cross_entropy.item())
    a, b = (replace(side, hidden_ND=side.hidden_ND[:0], target_N=side.target_N[:0]) for side in (a, b))
    found = joint_loss(a, b, maps(CLASSES), 0)
    (found[0].loss + found[1].loss).backward()
    assert found[0].loss.item() == found[1].loss.item() == 0.0
    assert made[0].grad is not None
    assert not bool(made[0].grad.any())


def test_sizes_that_do_not_fit_are_refused() -> None:
    a, b = sides(tensors(), VOCAB_B)
    with pytest.raises(ValueError, match="at least the 11 span starts; got 10 rows and 10 targets"):
        joint_loss(a, b, maps(CLASSES), 11)
    with pytest.raises(ValueError, match=r"on side a.*got 12 rows and 3 targets"):
        joint_loss(replace(a, target_N=a.target_N[:3]), b, maps(CLASSES), 3)
    with pytest.raises(ValueError, match=r"head b .*11 token ids, got 9"):
        joint_loss(a, b, same_tokenizer(), SPANS)
    with pytest.raises(ValueError, match="temperature"):
        joint_loss(a, b, maps(CLASSES), SPANS, temperature=0.0)
    with pytest.raises(ValueError, match="num_spans"):
        joint_loss(a, b, maps(CLASSES), SPANS, num_spans=0)


def test_places_are_the_span_starts_and_then_every_other_response_token_once() -> None:
    a, b = readings()
    spans = align(a.batch, b.batch)
    for reading, row_S in ((a, spans.row_a_S), (b, spans.row_b_S)):
        places = joint_places(reading.batch, spans.sample_S, row_S)
        assert torch.equal(places.sample_N[: spans.num_spans], spans.sample_S)
        assert torch.equal(places.position_N[: spans.num_spans], row_S)
        tokens = response_tokens(reading.batch)
        assert _as_set(places.sample_N, places.position_N, places.target_N) == _as_set(
            tokens.sample_N, tokens.position_N, tokens.target_N
        )
        assert len(places.target_N) == len(tokens.target_N) > spans.num_spans


def test_a_span_start_without_a_label_is_read_but_not_counted() -> None:
    a, b = readings()
    spans = align(a.batch, b.batch)
    labels_BT = a.batch.labels_BT.clone()
    labels_BT[spans.sample_S[0], spans.row_a_S[0] + 1] = IGNORED_LABEL
    batch: EncodedBatch = replace(a.batch, labels_BT=labels_BT)
    places = joint_places(batch, spans.sample_S, spans.row_a_S)
    assert places.target_N[0] == IGNORED_LABEL
    assert int((places.target_N >= 0).sum()) == len(response_tokens(batch).target_N)


def _as_set(*columns: Tensor) -> set[tuple[int, ...]]:
    return set(zip(*(column.tolist() for column in columns), strict=True))
