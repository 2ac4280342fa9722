"""The distillation losses: two models teach each other at span starts, or a payload of top classes teaches one.

Names: S span starts, D hidden size, V token ids, N rows of one chunk, C classes of the fold, K classes of a payload.

For each span start the two next-token distributions are formed from hidden rows, softened by a temperature T, folded
onto common classes, and compared in both directions at once:

    loss_a = weight_a * T^2 * sum_k w_k D(sg p_b || p_a)_k / num_spans,   loss_b likewise with the sides swapped

(Co-PLMs, arXiv 2511.11678, the distillation terms of its mutual learning; the fold and the byte spans are ours, see
`folding`). Temperature acts on logits, before the fold; T^2 keeps the gradient's size (arXiv 1503.02531). The teacher
is detached in each direction: its gradient is not small, it does not exist. With z the student's logits and c(u) the
class of id u, `d KL(p~ || q~) / d z_u = q_u (1 - p~_c(u) / q~_c(u)) / T`: the teacher's class mass is split by the
student's own proportions.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from cotuning.divergences import Comparison, Divergence, divergence_and_slope, top_classes_kl_and_slope
from cotuning.folding import FoldPair
from cotuning.heads import FoldedHead, Head
from cotuning.payload import PayloadRows

__all__ = ["DEFAULT_CHUNK_ROWS", "Head", "mutual_loss", "payload_loss"]

DEFAULT_CHUNK_ROWS = 128


def mutual_loss(
    hidden_a_SD: Tensor,
    head_a: Head,
    hidden_b_SD: Tensor,
    head_b: Head,
    fold: FoldPair,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    weight_a: float | None = 1.0,
    weight_b: float | None = 1.0,
    weights_S: Tensor | None = None,
    num_spans: float | None = None,
    after_break_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both directions of the folded distillation loss, each a mean over spans, fused with both heads.

    Args:
        hidden_a_SD: last hidden states of model A at `Alignment.row_a_S`; any float dtype.
        head_a: its head. Its weight gets a gradient only if it requires one.
        hidden_b_SD: the same spans of model B.
        head_b: its head.
        fold: the pair's maps, on the same device.
        temperature: T > 0; both sides.
        divergence: which one, teacher to student; see `divergences`.
        jsd_beta: the teacher's weight in the mixture, for `jsd`.
        chunk_rows: rows projected at a time; changes memory and speed, not the result.
        weight_a: factor on loss_a (A learns from B); None or 0 switches that direction off, at no cost.
        weight_b: factor on loss_b.
        weights_S: weight of each span, 1 if not given; constants.
        num_spans: what the sums are divided by, S if not given. Under gradient accumulation give the number of spans
            of the whole window, so that the result does not depend on how the window is cut.
        after_break_S: `fold.after_break(alignment)`, bool: the spans that `fold.unspaced` folds. Required where the
            fold has one.

    Returns:
        loss_a, loss_b: float32 (float64 if an input is), 0-dim, in nats. loss_a depends on A's tensors only, loss_b on
        B's only: either can be used, and its one backward pass run, without the other.

    Raises:
        ValueError: sizes that do not fit, a temperature that is not positive, an unknown divergence.
    """
    require_same_spans(hidden_a_SD, hidden_b_SD)
    require_maps(fold, head_a, head_b)
    factor = span_factor(temperature, num_spans, hidden_a_SD, weights_S)
    a, b = (
        FoldedHead(hidden_SD, head, None, head.num_tokens, temperature=temperature, scale=factor * (weight or 0.0))
        for hidden_SD, head, weight in ((hidden_a_SD, head_a, weight_a), (hidden_b_SD, head_b, weight_b))
    )
    if a.scale or b.scale:
        compare = partial(divergence_and_slope, divergence=divergence, jsd_beta=jsd_beta)
        compare_spans(
            a,
            b,
            fold,
            len(hidden_a_SD),
            compare,
            chunk_rows=chunk_rows,
            weights_S=weights_S,
            after_break_S=after_break_S,
        )
    return a.loss(), b.loss()


def compare_spans(
    a: FoldedHead,
    b: FoldedHead,
    fold: FoldPair,
    num_spans: int,
    compare: Callable[..., Comparison],
    *,
    chunk_rows: int,
    weights_S: Tensor | None = None,
    after_break_S: Tensor | None = None,
) -> None:
    """Compare the first `num_spans` rows of two sides, pairwise, and add losses and gradients to those that learn.

    Args:
        fold, chunk_rows, weights_S, after_break_S: as for `mutual_loss`.
        compare: `divergence_and_slope` with its options.
    """
    with a.forward_only():
        for part, chosen in fold.parts(after_break_S, num_spans):
            a.fold_onto(None if part.identical else part.map_a_V, part.num_classes)
            b.fold_onto(None if part.identical else part.map_b_V, part.num_classes)
            for rows in _chunks(chosen, num_spans, chunk_rows):
                weights_N = None if weights_S is None else weights_S[rows].to(a.dtype)
                _compare(a, b, rows, weights_N, compare)


def _chunks(chosen: Tensor | slice, num_rows: int, chunk_rows: int) -> Iterator[Tensor | slice]:
    if isinstance(chosen, Tensor):
        yield from torch.split(chosen, chunk_rows) if len(chosen) else ()
        return
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))


def _compare(
    a: FoldedHead,
    b: FoldedHead,
    rows: slice | Tensor,
    weights_N: Tensor | None,
    compare: Callable[..., Comparison],
) -> None:
    """Add one chunk's losses and gradients to the sides that learn."""
    logs_a_NC, logs_b_NC = a.class_log_probs(rows), b.class_log_probs(rows)
    for student, logs_NC, teacher_logs_NC in ((a, logs_a_NC, logs_b_NC), (b, logs_b_NC, logs_a_NC)):
        slope_NC: Tensor | None = None
        if student.scale:
            values_N, slope_NC = compare(teacher_logs_NC, logs_NC, slope=student.learns)
            student.add_loss(values_N, weights_N)
        if student.learns:
            student.accumulate(rows, slope_NC, logs_NC, weights_N)


def payload_loss(
    hidden_SD: Tensor,
    head: Head,
    teacher: PayloadRows,
    *,
    map_V: Tensor | None = None,
    temperature: float | None = None,
    weights_S: Tensor | None = None,
    num_spans: float | None = None,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> Tensor:
    """Forward KL from a received teacher to a student over the teacher's K classes and one tail bucket.

    A true divergence between coarsened distributions, so never negative; without the tail bucket it would not be one.
    T^2 as in `mutual_loss`; a mean over rows.

    Args:
        hidden_SD: the student's last hidden states at the teacher's rows (`payload.match_rows`).
        head: the student's head.
        teacher: S rows, on the same device; see `PayloadRows.take`.
        map_V: the student's map onto the payload's classes, None where these are the student's own token ids.
        temperature: the payload's own if not given.
        weights_S: weight of each row, 1 if not given.
        num_spans: what the sum is divided by, S if not given.
        chunk_rows: rows projected at a time.

    Returns:
        0-dim, in nats; its gradient reaches the student's tensors only.

    Raises:
        ValueError: sizes that do not fit or a temperature that is not positive.
    """
    temperature = teacher.temperature if temperature is None else temperature
    require_same_spans(hidden_SD, teacher.tail_S)
    if map_V is not None:
        _require_map("the student's head", head, map_V)
    elif head.num_tokens != teacher.num_classes:
        raise ValueError(f"expected a head of the payload's {teacher.num_classes} classes, got {head.num_tokens}")
    factor = span_factor(temperature, num_spans, hidden_SD, weights_S)
    student = FoldedHead(hidden_SD, head, map_V, teacher.num_classes, temperature=temperature, scale=factor)
    with student.forward_only():
        for rows, weights_N in student.chunks(chunk_rows, weights_S):
            logs_NC = student.class_log_probs(rows)
            values_N, slope_NC = top_classes_kl_and_slope(
                teacher.ids_SK[rows],
                teacher.log_probs_SK[rows].to(student.dtype),
                teacher.tail_S[rows].to(student.dtype),
                logs_NC,
                slope=student.learns,
            )
            student.add_loss(values_N, weights_N)
            if slope_NC is not None:
                student.accumulate(rows, slope_NC, logs_NC, weights_N)
    return student.loss()


def span_factor(temperature: float, num_spans: float | None, hidden_SD: Tensor, weights_S: Tensor | None) -> float:
    """T^2 over the number of spans, both checked."""
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    if weights_S is not None and weights_S.shape != hidden_SD.shape[:1]:
        raise ValueError(f"expected one weight for each of {len(hidden_SD)} spans, got shape {list(weights_S.shape)}")
    if num_spans is None:
        return temperature**2 / max(len(hidden_SD), 1)
    if num_spans <= 0:
        raise ValueError(f"expected num_spans above 0, got {num_spans}")
    return temperature**2 / num_spans


def require_same_spans(first: Tensor, second: Tensor) -> None:
    """Raises ValueError where two sides have unlike numbers of rows."""
    if len(first) != len(second):
        raise ValueError(f"expected the same spans on both sides, got {len(first)} and {len(second)} rows")


def require_maps(fold: FoldPair, head_a: Head, head_b: Head) -> None:
    """Raises ValueError where a map is not over its head's ids."""
    for name, head, map_V in (("a", head_a, fold.map_a_V), ("b", head_b, fold.map_b_V)):
        _require_map(f"head {name}", head, map_V)


def _require_map(name: str, head: Head, map_V: Tensor) -> None:
    if head.num_tokens != len(map_V):
        raise ValueError(f"expected {name} to hold the fold's {len(map_V)} token ids, got {head.num_tokens}")
