"""The mutual loss against slow formulas, by hand, against PyTorch's own KL, and its invariants."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cotuning.alignment import align, encode_batch
from cotuning.divergences import divergence_and_slope
from cotuning.folding import FoldPair, fold_pair
from cotuning.mutual_loss import Head, mutual_loss
from tests.cotuning.trained_tokenizers import SENTENCES, table_of, trained

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
SPANS, DIM_A, DIM_B, VOCAB_A, VOCAB_B, CLASSES = 7, 5, 4, 11, 9, 6


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def a_fold(seed: int = 0, classes: int = CLASSES) -> FoldPair:
    """Random maps under which each class has an id on both sides."""
    generator = torch.Generator().manual_seed(seed)
    maps = [
        torch.cat([torch.arange(classes), torch.randint(classes, (size - classes,), generator=generator)])[
            torch.randperm(size, generator=generator)
        ]
        for size in (VOCAB_A, VOCAB_B)
    ]
    return FoldPair(maps[0], maps[1], classes, classes - 2, classes - 1, classes - 2, False, "x")


def no_fold(size: int) -> FoldPair:
    ids = torch.arange(size)
    return FoldPair(ids, ids, size, 0, 0, size, True, "x")


def sides(grad: bool = True, padded: int = 0):
    hidden_a, hidden_b = random(SPANS, DIM_A, seed=1, grad=grad), random(SPANS, DIM_B, seed=2, grad=grad)
    rows_a = torch.cat([random(VOCAB_A, DIM_A, seed=3), random(padded, DIM_A, seed=6)]).requires_grad_(grad)
    rows_b = torch.cat([random(VOCAB_B, DIM_B, seed=4), random(padded, DIM_B, seed=7)]).requires_grad_(grad)
    return hidden_a, Head(rows_a, VOCAB_A), hidden_b, Head(rows_b, VOCAB_B)


def slow_class_probs(
    hidden: list[float], head: Head, map_v: list[int], classes: int, temperature: float
) -> list[float]:
    """One row, by loops: head, bias, scale, cap, temperature, softmax, sum by class."""
    logits = []
    for token in range(head.num_tokens):
        raw = sum(h * w for h, w in zip(hidden, head.weight_VD[token].tolist(), strict=True))
        raw = (raw + (0.0 if head.bias_V is None else float(head.bias_V[token]))) * head.logit_scale
        logits.append((raw if head.soft_cap is None else head.soft_cap * math.tanh(raw / head.soft_cap)) / temperature)
    total = sum(math.exp(logit) for logit in logits)
    folded = [0.0] * classes
    for token, logit in enumerate(logits):
        folded[map_v[token]] += math.exp(logit) / total
    return folded


def slow_divergence(p: list[float], q: list[float], divergence: str, beta: float) -> float:
    """Teacher p, student q."""

    def kl(x: list[float], y: list[float]) -> float:
        return sum(u * math.log(u / v) for u, v in zip(x, y, strict=True))

    if divergence == "forward_kl":
        return kl(p, q)
    if divergence == "reverse_kl":
        return kl(q, p)
    mixture = [beta * u + (1 - beta) * v for u, v in zip(p, q, strict=True)]
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("extras", [False, True])
def test_both_directions_equal_the_slow_formula(divergence, temperature, extras):
    hidden_a, head_a, hidden_b, head_b = sides()
    if extras:
        head_a = Head(head_a.weight_VD, VOCAB_A, random(VOCAB_A, seed=5), logit_scale=0.7, soft_cap=3.0)
    pair = a_fold()
    loss_a, loss_b = mutual_loss(
        hidden_a, head_a, hidden_b, head_b, pair, temperature=temperature, divergence=divergence, jsd_beta=0.3,
        chunk_rows=3,
    )  # fmt: skip
    expected_a = expected_b = 0.0
    for row in range(SPANS):
        a = slow_class_probs(hidden_a[row].tolist(), head_a, pair.map_a_V.tolist(), CLASSES, temperature)
        b = slow_class_probs(hidden_b[row].tolist(), head_b, pair.map_b_V.tolist(), CLASSES, temperature)
        expected_a += temperature**2 * slow_divergence(b, a, divergence, 0.3) / SPANS
        expected_b += temperature**2 * slow_divergence(a, b, divergence, 0.3) / SPANS
    assert loss_a.item() == pytest.approx(expected_a, rel=1e-12)
    assert loss_b.item() == pytest.approx(expected_b, rel=1e-12)


def test_a_hand_worked_case():
    """Student halves (1/2, 1/2), teacher quarters folded to (3/4, 1/4): KL = 3/4 log 3/2 + 1/4 log 1/2."""
    pair = FoldPair(torch.tensor([0, 1]), torch.tensor([0, 0, 0, 1]), 2, 1, 1, 1, False, "x")
    student, teacher = Head(torch.zeros(2, 1), 2), Head(torch.zeros(4, 1), 4)
    loss_a, loss_b = mutual_loss(torch.ones(1, 1), student, torch.ones(1, 1), teacher, pair)
    assert loss_a.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert loss_b.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("identical", [True, False])
def test_equal_tokenizers_give_torchs_kl_in_loss_and_gradient(temperature, identical):
    """With the fast path and with an identity fold: loss and every gradient, to 1e-12."""
    hidden_a, hidden_b = random(SPANS, DIM_A, seed=1, grad=True), random(SPANS, DIM_B, seed=2)
    weight_a, weight_b = random(VOCAB_A, DIM_A, seed=3, grad=True), random(VOCAB_A, DIM_B, seed=4)
    ids = torch.arange(VOCAB_A)
    pair = FoldPair(ids, ids, VOCAB_A, 0, 1, VOCAB_A, identical, "x")
    loss, _ = mutual_loss(
        hidden_a, Head(weight_a, VOCAB_A), hidden_b, Head(weight_b, VOCAB_A), pair, temperature=temperature,
        chunk_rows=2,
    )  # fmt: skip
    loss.backward()
    got = (loss.detach(), hidden_a.grad, weight_a.grad)
    hidden_a.grad = weight_a.grad = None
    plain = temperature**2 * functional.kl_div(
        (hidden_a @ weight_a.T / temperature).log_softmax(1),
        (hidden_b @ weight_b.T / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    plain.backward()
    for mine, theirs in zip(got, (plain.detach(), hidden_a.grad, weight_a.grad), strict=True):
        assert (mine - theirs).abs().max() <= 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("extras", [False, True])
def test_gradients_pass_gradcheck(divergence, extras):
    hidden_a, head_a, hidden_b, head_b = sides()
    bias = random(VOCAB_A, seed=5, grad=True)
    weights = torch.rand(SPANS, dtype=torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias_v: Tensor) -> Tensor:
        cap, scale = (2.0, 0.6) if extras else (None, 1.0)
        head = Head(weight, VOCAB_A, bias_v, logit_scale=scale, soft_cap=cap)
        return mutual_loss(
            hidden, head, hidden_b.detach(), head_b, a_fold(), temperature=1.5, divergence=divergence, jsd_beta=0.4,
            chunk_rows=3, weights_S=weights, num_spans=5.0, weight_a=0.8,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden_a, head_a.weight_VD, bias))


def gradients(chunk_rows: int = 128, pair: FoldPair | None = None, **options) -> list[Tensor]:
    hidden_a, head_a, hidden_b, head_b = sides(padded=options.pop("padded", 0))
    loss_a, loss_b = mutual_loss(hidden_a, head_a, hidden_b, head_b, pair or a_fold(), chunk_rows=chunk_rows, **options)
    (loss_a + loss_b).backward()
    tensors = (hidden_a, head_a.weight_VD, hidden_b, head_b.weight_VD)
    return [loss_a.detach(), loss_b.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_chunk_size_changes_nothing(divergence):
    whole = gradients(divergence=divergence)
    for chunk_rows in (1, 2, 5):
        for one, other in zip(whole, gradients(chunk_rows, divergence=divergence), strict=True):
            assert (one - other).abs().max() <= 1e-14


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_swapping_the_sides_swaps_the_losses(divergence):
    hidden_a, head_a, hidden_b, head_b = sides()
    pair = a_fold()
    swapped = FoldPair(pair.map_b_V, pair.map_a_V, CLASSES, 4, 5, 4, False, "x")
    one = mutual_loss(hidden_a, head_a, hidden_b, head_b, pair, divergence=divergence)
    other = mutual_loss(hidden_b, head_b, hidden_a, head_a, swapped, divergence=divergence)
    assert one[0] == other[1]
    assert one[1] == other[0]


def test_a_head_padded_beyond_the_tokenizer_has_no_say_and_no_gradient_there():
    plain, padded = gradients(), gradients(padded=5)
    assert plain[0] == padded[0]
    assert torch.equal(padded[3][VOCAB_A:], torch.zeros(5, DIM_A, dtype=torch.float64))
    with pytest.raises(ValueError, match="11 token ids, got 9"):
        Head(random(9, 3), VOCAB_A)


def test_the_teacher_has_no_gradient_at_all():
    hidden_a, head_a, hidden_b, head_b = sides()
    loss_a, loss_b = mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold())
    loss_a.backward()
    assert hidden_b.grad is None
    assert head_b.weight_VD.grad is None
    assert hidden_a.grad.abs().sum() > 0
    before = hidden_a.grad.clone()
    loss_b.backward()
    assert torch.equal(hidden_a.grad, before)
    assert hidden_b.grad.abs().sum() > 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_model_has_nothing_to_learn_from_itself(divergence):
    hidden, weight = random(SPANS, DIM_A, seed=1, grad=True), random(VOCAB_A, DIM_A, seed=3)
    losses = mutual_loss(
        hidden, Head(weight, VOCAB_A), hidden.detach(), Head(weight, VOCAB_A), no_fold(VOCAB_A), divergence=divergence
    )
    losses[0].backward()
    assert abs(losses[0].item()) <= 1e-15
    assert hidden.grad.abs().max() <= 1e-15


def test_a_direction_that_is_off_is_zero_and_has_no_graph():
    hidden_a, head_a, hidden_b, head_b = sides()
    both = mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold())
    for off in (None, 0.0):
        loss_a, loss_b = mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold(), weight_b=off)
        assert loss_a == both[0]
        assert loss_b.item() == 0.0
        assert not loss_b.requires_grad


def test_weights_scale_their_own_direction_only():
    one, other = gradients(), gradients(weight_a=0.25, weight_b=3.0)
    for index, factor in enumerate((0.25, 3.0, 0.25, 0.25, 3.0, 3.0)):
        assert torch.allclose(other[index], factor * one[index], rtol=1e-13)


def test_two_micro_batches_equal_one_batch():
    """Sums over the window's spans, not means of means: batches of 2 and 5 spans give what 7 give."""
    hidden_a, head_a, hidden_b, head_b = sides()
    whole = mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold())
    parts = [
        mutual_loss(hidden_a[rows], head_a, hidden_b[rows], head_b, a_fold(), num_spans=SPANS)
        for rows in (slice(0, 2), slice(2, SPANS))
    ]
    for direction in (0, 1):
        assert (parts[0][direction] + parts[1][direction]).item() == pytest.approx(whole[direction].item(), rel=1e-13)
    assert parts[0][0].item() != pytest.approx(whole[0].item() * 2 / 7)
    of_zeros = mutual_loss(
        hidden_a, head_a, hidden_b, head_b, a_fold(), weights_S=torch.tensor([1.0, 1, 0, 0, 0, 0, 0]), num_spans=SPANS
    )
    assert of_zeros[0].item() == pytest.approx(parts[0][0].item(), rel=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_fold_in_two_parts_is_the_mean_over_both(divergence):
    """Spans after a break are compared by the other map: loss and gradients are those of the parts, by share."""
    hidden_a, head_a, hidden_b, head_b = sides()
    spaced, unspaced = a_fold(0), a_fold(1, classes=4)
    no_break = [torch.zeros(size, dtype=torch.bool) for size in (VOCAB_A, VOCAB_B)]
    pair = replace(spaced, unspaced=unspaced, breaks_a_V=no_break[0], breaks_b_V=no_break[1])
    after_break = torch.tensor([True, False, False, True, True, False, False])
    weights = torch.rand(SPANS, dtype=torch.float64)
    options = {"divergence": divergence, "chunk_rows": 2, "num_spans": 5.0}
    whole = mutual_loss(
        hidden_a, head_a, hidden_b, head_b, pair, after_break_S=after_break, weights_S=weights, **options
    )
    (whole[0] + 2 * whole[1]).backward()
    got = [tensor.grad for tensor in (hidden_a, head_a.weight_VD, hidden_b, head_b.weight_VD)]
    again = sides()
    parts = [
        mutual_loss(again[0][rows], again[1], again[2][rows], again[3], part, weights_S=weights[rows], **options)
        for part, rows in ((spaced, ~after_break), (unspaced, after_break))
    ]
    (parts[0][0] + parts[1][0] + 2 * parts[0][1] + 2 * parts[1][1]).backward()
    expected = [tensor.grad for tensor in (again[0], again[1].weight_VD, again[2], again[3].weight_VD)]
    for direction in (0, 1):
        assert whole[direction].item() == pytest.approx((parts[0][direction] + parts[1][direction]).item(), rel=1e-13)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-14
    with pytest.raises(ValueError, match="after_break_S of 7 spans"):
        mutual_loss(hidden_a, head_a, hidden_b, head_b, pair)


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    """The head's matrix is also the embedding that made the hidden states: the two gradients add up."""
    hidden_b, head_b = sides()[2:]
    tokens = torch.tensor([0, 3, 3, 7, 1, 10, 2])
    embedding = random(VOCAB_A, DIM_A, seed=3, grad=True)
    loss, _ = mutual_loss(embedding[tokens].tanh(), Head(embedding, VOCAB_A), hidden_b, head_b, a_fold(), chunk_rows=3)
    loss.backward()
    tied = embedding.grad.clone()
    embedding.grad = None
    pair = a_fold()

    def folded(hidden: Tensor, weight: Tensor, map_v: Tensor) -> Tensor:
        probs = (hidden @ weight.T).softmax(1)
        return probs.new_zeros(SPANS, CLASSES).index_add(1, map_v, probs).log()

    student = folded(embedding[tokens].tanh(), embedding, pair.map_a_V)
    teacher = folded(hidden_b, head_b.weight_VD, pair.map_b_V).detach()
    functional.kl_div(student, teacher, reduction="batchmean", log_target=True).backward()
    assert (tied - embedding.grad).abs().max() <= 1e-14


def test_a_frozen_head_gets_no_gradient():
    hidden_a, head_a, hidden_b, head_b = sides()
    frozen = Head(head_a.weight_VD.detach(), VOCAB_A)
    loss_a, _ = mutual_loss(hidden_a, frozen, hidden_b, head_b, a_fold())
    loss_a.backward()
    trained_head = gradients()
    assert frozen.weight_VD.grad is None
    assert torch.equal(hidden_a.grad, trained_head[2])


def test_no_spans_is_zero_with_a_graph():
    hidden_a, head_a, hidden_b, head_b = sides()
    loss_a, loss_b = mutual_loss(hidden_a[:0], head_a, hidden_b[:0], head_b, a_fold())
    assert (loss_a.item(), loss_b.item()) == (0.0, 0.0)
    (loss_a + loss_b).backward()
    assert torch.equal(hidden_a.grad, torch.zeros_like(hidden_a))


def test_one_backward_pass_and_no_graph_when_none_is_wanted():
    hidden_a, head_a, hidden_b, head_b = sides()
    single = hidden_a.detach().float().requires_grad_()
    loss_a, _ = mutual_loss(single, Head(head_a.weight_VD.detach().float(), VOCAB_A), hidden_b, head_b, a_fold())
    (2 * loss_a).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss_a.backward()
    loss_a, _ = mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold())
    loss_a.backward()
    assert (single.grad - 2 * hidden_a.grad).abs().max() < 1e-6
    with torch.no_grad():
        assert not mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold())[0].requires_grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_is_close_to_float64(divergence):
    exact = gradients(divergence=divergence)
    hidden_a, head_a, hidden_b, head_b = (
        item.detach().bfloat16().requires_grad_()
        if isinstance(item, Tensor)
        else Head(item.weight_VD.detach().bfloat16().requires_grad_(), item.num_tokens)
        for item in sides()
    )
    loss_a, loss_b = mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold(), divergence=divergence)
    (loss_a + loss_b).backward()
    assert loss_a.dtype == torch.float32
    assert hidden_a.grad.dtype == head_a.weight_VD.grad.dtype == torch.bfloat16
    assert loss_a.item() == pytest.approx(exact[0].item(), rel=0.05)
    assert (hidden_a.grad.double() - exact[2]).abs().max() <= 0.05 * exact[2].abs().max()


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_sums():
    hidden_a, head_a, hidden_b, head_b = (
        item.detach().float().requires_grad_()
        if isinstance(item, Tensor)
        else Head(item.weight_VD.detach().float().requires_grad_(), item.num_tokens)
        for item in sides()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_a, _ = mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold())
    loss_a.backward()
    assert loss_a.dtype == hidden_a.grad.dtype == torch.float32
    assert loss_a.item() == pytest.approx(gradients()[0].item(), rel=0.05)
    assert loss_a.item() != mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold())[0].item()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_far_apart_models_give_finite_losses_and_gradients(divergence):
    """Probabilities that underflow in float32 on one side or both."""
    hidden = torch.eye(3)[:2].requires_grad_()
    teacher = torch.eye(3)[1:]
    weight_a = torch.tensor([[300.0, -300, 0], [-300, 300, 0], [0, 0, 300], [0, 0, 299]], requires_grad=True)
    pair = FoldPair(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 2]), 3, 1, 2, 1, False, "x")
    losses = mutual_loss(hidden, Head(weight_a, 4), teacher, Head(weight_a.detach(), 4), pair, divergence=divergence)
    losses[0].backward()
    assert torch.isfinite(losses[0])
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight_a.grad).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.5, 4), st.sampled_from(DIVERGENCES), st.floats(0.05, 0.95))
def test_divergences_are_never_negative_and_folding_never_raises_them(seed, temperature, divergence, beta):
    """Data-processing inequality, for equal tokenizers under any fold, and from a fold to a coarser one."""
    hidden_a, hidden_b = random(SPANS, DIM_A, seed=seed) * 3, random(SPANS, DIM_B, seed=seed + 1) * 3
    heads = Head(random(VOCAB_A, DIM_A, seed=seed + 2), VOCAB_A), Head(random(VOCAB_A, DIM_B, seed=seed + 3), VOCAB_A)
    map_v = a_fold(seed).map_a_V
    pairs = [no_fold(VOCAB_A)] + [
        FoldPair(map_v.clamp(max=last), map_v.clamp(max=last), last + 1, 0, 0, 0, False, "x") for last in (5, 2)
    ]
    losses = [
        mutual_loss(
            hidden_a, heads[0], hidden_b, heads[1], pair, temperature=temperature, divergence=divergence, jsd_beta=beta
        )
        for pair in pairs
    ]
    for finer, coarser in pairwise(losses):
        for direction in (0, 1):
            assert -1e-12 <= coarser[direction].item() <= finer[direction].item() + 1e-12


def test_the_slope_sums_to_zero():
    logs = [random(4, 6, seed=seed).log_softmax(1) for seed in (0, 1)]
    for divergence in DIVERGENCES:
        _, slope = divergence_and_slope(logs[0], logs[1].clone(), divergence, 0.3, slope=True)
        assert slope.sum(1).abs().max() <= 1e-15
    with pytest.raises(ValueError, match="forward_kl, reverse_kl or jsd"):
        divergence_and_slope(logs[0], logs[1], "kl", 0.5, slope=True)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        divergence_and_slope(logs[0], logs[1], "jsd", 1.0, slope=True)


class GreatestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return result


def test_nothing_of_spans_times_vocabulary_is_ever_made():
    spans, dim, vocabulary, chunk_rows = 64, 4, 100, 8
    ids = torch.arange(vocabulary)
    pair = FoldPair(ids % 50, ids % 60, 60, 0, 1, 50, False, "x")
    hidden = [random(spans, dim, seed=seed, grad=True) for seed in (0, 1)]
    heads = [Head(random(vocabulary, dim, seed=seed, grad=True), vocabulary) for seed in (2, 3)]
    with GreatestTensor() as greatest:
        losses = mutual_loss(hidden[0], heads[0], hidden[1], heads[1], pair, chunk_rows=chunk_rows)
        (losses[0] + losses[1]).backward()
    assert greatest.elements == chunk_rows * vocabulary


def test_sizes_that_do_not_fit_are_refused():
    hidden_a, head_a, hidden_b, head_b = sides()
    with pytest.raises(ValueError, match="got 7 and 6 rows"):
        mutual_loss(hidden_a, head_a, hidden_b[:6], head_b, a_fold())
    with pytest.raises(ValueError, match=r"head a .*9 token ids, got 11"):
        mutual_loss(hidden_a, head_a, hidden_b, head_b, no_fold(VOCAB_B))
    with pytest.raises(ValueError, match="temperature"):
        mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold(), temperature=0.0)
    with pytest.raises(ValueError, match="num_spans"):
        mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold(), num_spans=0)
    with pytest.raises(ValueError, match=r"7 spans, got shape \[2\]"):
        mutual_loss(hidden_a, head_a, hidden_b, head_b, a_fold(), weights_S=torch.ones(2))


def oracle_logits(batch, table) -> Tensor:
    """Logits of a model that knows the text: at each position nearly all mass on the next id."""
    next_ids = batch.input_ids_BT.roll(-1, dims=1)
    return functional.one_hot(next_ids, table.num_tokens).double() * 30


def test_the_causal_shift_two_models_that_know_the_text_agree_at_span_starts_only():
    """Read at the spans' rows they agree wherever the fold does; read one position later they do not."""
    tables = table_of("byte_level", 0), table_of("byte_fallback", 1)
    tokenizers = trained("byte_level", 0), trained("byte_fallback", 1)
    texts = [text for text in SENTENCES if text.isascii()]
    a, b = (
        encode_batch(tokenizer, table, ["Q:\n"] * len(texts), texts, max_length=256)
        for tokenizer, table in zip(tokenizers, tables, strict=True)
    )
    spans, pair = align(a, b), fold_pair(tokenizers[0], tables[0], tokenizers[1], tables[1])
    agree = pair.map_a_V[spans.first_token_a_S] == pair.map_b_V[spans.first_token_b_S]
    heads = [Head(torch.eye(table.num_tokens, dtype=torch.float64), table.num_tokens) for table in tables]
    logits_a, logits_b = (oracle_logits(batch, table) for batch, table in ((a, tables[0]), (b, tables[1])))

    def loss(shift: int) -> float:
        rows_a, rows_b = (spans.row_a_S + shift)[agree], (spans.row_b_S + shift)[agree]
        sample = spans.sample_S[agree]
        return float(mutual_loss(logits_a[sample, rows_a], heads[0], logits_b[sample, rows_b], heads[1], pair)[0])

    assert agree.double().mean() > 0.95
    assert loss(0) < 1e-6
    assert loss(1) > 1.0


def test_only_span_start_rows_receive_gradient():
    """Exact zeros at prompt, padding and positions inside spans."""
    tokenizers, tables = (trained("byte_level"), trained("unigram")), (table_of("byte_level"), table_of("unigram"))
    texts = list(SENTENCES[:3])
    a, b = (
        encode_batch(tokenizer, table, ["Q:\n"] * 3, texts, max_length=256)
        for tokenizer, table in zip(tokenizers, tables, strict=True)
    )
    spans, pair = align(a, b), fold_pair(tokenizers[0], tables[0], tokenizers[1], tables[1])
    states = random(*a.input_ids_BT.shape, 4, seed=1, grad=True)
    other = random(*b.input_ids_BT.shape, 4, seed=2)
    heads = [Head(random(table.num_tokens, 4, seed=3), table.num_tokens) for table in tables]
    loss, _ = mutual_loss(
        states[spans.sample_S, spans.row_a_S], heads[0], other[spans.sample_S, spans.row_b_S], heads[1], pair
    )
    loss.backward()
    touched = torch.zeros(a.input_ids_BT.shape, dtype=torch.bool)
    touched[spans.sample_S, spans.row_a_S] = True
    assert torch.equal(states.grad.abs().sum(-1) > 0, touched)
    assert touched.sum() < a.attention_mask_BT.sum()
