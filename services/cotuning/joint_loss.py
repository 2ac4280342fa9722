"""Cross-entropy and mutual loss of two models from the same logits: one pass through each head.

Names: B rows, T tokens, S span starts, N positions of one side that predict a response token, span starts first,
D hidden size.

    loss_a = sum_n CE_a,n / num_tokens_a + weight_a * T^2 * sum_k D(sg p_b || p_a)_k / num_spans,  loss_b likewise

(Co-PLMs, arXiv 2511.11678.) Most of what these terms cost is matrix products with the heads, and every span start is
also the place of a response token. So a chunk of span starts is projected once for both terms, and both slopes go back
through the head as one. The other positions follow, for their cross-entropy only. What `cross_entropy` and
`mutual_loss` give apart this gives together, up to rounding; the terms are no longer apart in the gradient.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cotuning.divergences import Divergence, divergence_and_slope
from cotuning.encoding import IGNORED_LABEL, EncodedBatch
from cotuning.folding import FoldPair
from cotuning.heads import FoldedHead, Head
from cotuning.mutual_loss import DEFAULT_CHUNK_ROWS, compare_spans, require_maps, span_factor


@dataclass(frozen=True)
class JointPlaces:
    """Where one side is projected: at the span starts, in their order, and then where else a label is predicted.

    Attributes:
        sample_N: row of the batch.
        position_N: position whose hidden state predicts the token.
        target_N: the token, `IGNORED_LABEL` where a span starts with one that has no label.
    """

    sample_N: Tensor
    position_N: Tensor
    target_N: Tensor


def joint_places(batch: EncodedBatch, sample_S: Tensor, row_S: Tensor) -> JointPlaces:
    """Find them.

    Args:
        batch: one side's.
        sample_S: `Alignment.sample_S`.
        row_S: that side's `Alignment.row_a_S` or `row_b_S`.
    """
    next_BT = batch.labels_BT[:, 1:]
    rest_BT = next_BT != IGNORED_LABEL
    rest_BT[sample_S, row_S] = False
    sample_R, position_R = rest_BT.nonzero(as_tuple=True)
    sample_N, position_N = torch.cat([sample_S, sample_R]), torch.cat([row_S, position_R])
    return JointPlaces(sample_N, position_N, next_BT[sample_N, position_N])


@dataclass(frozen=True)
class JointSide:
    """One model at its `JointPlaces`.

    Attributes:
        hidden_ND: its last hidden states there.
        head: its head.
        target_N: the tokens.
        weight: of what it learns from the other side; 0 switches that off.
        num_tokens: what the sum of the cross-entropy is divided by, the number of labelled places if not given. Under
            gradient accumulation give that of the whole window.
    """

    hidden_ND: Tensor
    head: Head
    target_N: Tensor
    weight: float = 1.0
    num_tokens: float | None = None


@dataclass(frozen=True)
class JointLoss:
    """What one side gets.

    Attributes:
        loss: cross-entropy plus weighted divergence; its gradient reaches this side's tensors only.
        cross_entropy: a token, without gradient.
        divergence: a span, times T^2, before its weight, without gradient; None where the weight is 0.
    """

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor | None


def joint_loss(
    a: JointSide,
    b: JointSide,
    fold: FoldPair,
    num_starts: int,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    num_spans: float | None = None,
    after_break_S: Tensor | None = None,
) -> tuple[JointLoss, JointLoss]:
    """Both sides' cross-entropy, and both directions of the folded distillation loss.

    Gradients are formed chunk by chunk in the forward pass (see `heads`): one backward pass a call.

    Args:
        a: one side.
        b: the other; as many leading places of both are the starts of the same spans.
        fold: the pair's maps, on the same device.
        num_starts: S.
        temperature: T > 0, of the divergence on both sides; the cross-entropy's is one.
        divergence: which one, teacher to student; see `divergences`.
        jsd_beta: the teacher's weight in the mixture, for `jsd`.
        chunk_rows: rows projected at a time; changes memory and speed, not the result.
        num_spans: what the sums of the divergences are divided by, S if not given; see `JointSide.num_tokens`.
        after_break_S: see `mutual_loss`.

    Returns:
        0-dim losses, in nats; float32 (float64 if an input is).

    Raises:
        ValueError: as `mutual_loss`; fewer places than spans; places and targets of unlike number.
    """
    require_maps(fold, a.head, b.head)
    for name, side in (("a", a), ("b", b)):
        if not num_starts <= len(side.hidden_ND) == len(side.target_N):
            raise ValueError(
                f"expected as many hidden rows as targets on side {name}, and at least the {num_starts} span starts; "
                f"got {len(side.hidden_ND)} rows and {len(side.target_N)} targets"
            )
    factor = span_factor(temperature, num_spans, a.hidden_ND[:num_starts], None)
    token_scales = [_token_scale(side) for side in (a, b)]
    heads = [
        FoldedHead(
            side.hidden_ND,
            side.head,
            None,
            side.head.num_tokens,
            temperature=temperature,
            scale=factor * side.weight,
            target_S=side.target_N,
            token_scale=token_scale,
        )
        for side, token_scale in zip((a, b), token_scales, strict=True)
    ]
    compare = partial(divergence_and_slope, divergence=divergence, jsd_beta=jsd_beta)
    compared = num_starts if a.weight or b.weight else 0
    if compared:
        compare_spans(heads[0], heads[1], fold, compared, compare, chunk_rows=chunk_rows, after_break_S=after_break_S)
    for head, side in zip(heads, (a, b), strict=True):
        with head.forward_only():
            for start in range(compared, len(side.target_N), chunk_rows):
                head.only_tokens(slice(start, start + chunk_rows))
    found = []
    for head, side, token_scale in zip(heads, (a, b), token_scales, strict=True):
        spans, tokens = head.sums()
        found.append(JointLoss(head.loss(), tokens * token_scale, spans * factor if side.weight else None))
    return found[0], found[1]


def _token_scale(side: JointSide) -> float:
    num_tokens = int((side.target_N >= 0).sum()) if side.num_tokens is None else side.num_tokens
    return 1.0 / max(num_tokens, 1)
