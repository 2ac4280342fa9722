"""The interface of every matching: two readings of the same rows in, what each side is taught out.

Names: B rows, T tokens, D hidden size, N rows of hidden states, V token ids.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cotuning.encoding import EncodedBatch
from cotuning.heads import Head
from cotuning.language_model import logits

MatchingName = Literal["fold", "ce_only", "uld", "gold", "mined_dtw", "alm"]

ROWS_AT_ONCE = 128
"""Hidden rows that are projected at a time."""


@dataclass(frozen=True)
class Reading:
    """One model's forward pass over a batch.

    Attributes:
        batch: what it read.
        hidden_BTD: its last hidden states; the one at a position predicts the *next* token.
        head: its LM head.
        learns: whether it is taught by the other side.
        joint_weight: given by a caller who also wants the cross-entropy: a matching that forms both from the same
            logits then answers with `Lesson.joint`, with this weight of its term.
        num_tokens: what the sum of that cross-entropy is divided by, the batch's response tokens if not given.
    """

    batch: EncodedBatch
    hidden_BTD: Tensor
    head: Head
    learns: bool = True
    joint_weight: float | None = None
    num_tokens: float | None = None

    def detached(self) -> "Reading":
        """The same numbers as constants: a teacher."""
        head = Head(
            self.head.weight_VD.detach(),
            self.head.num_tokens,
            None if self.head.bias_V is None else self.head.bias_V.detach(),
            self.head.logit_scale,
            self.head.soft_cap,
        )
        return Reading(self.batch, self.hidden_BTD.detach(), head, learns=False)


@dataclass(frozen=True)
class Lesson:
    """What one side is taught in a batch.

    Attributes:
        terms: 0-dim losses by the name under which they are reported, with gradients to this side's tensors only.
            Empty where the side learns nothing from the other.
        weights: of the terms in the loss, 1 where not named.
        metrics: other numbers to report, 0-dim, without gradient.
        joint: the side's cross-entropy plus `Reading.joint_weight` times the term that came of the same logits, with
            the gradient of both; the two are then among `metrics`, the cross-entropy as `ce`. None from a matching
            that does not form them together, or was not asked to.
    """

    terms: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    joint: Tensor | None = None

    def loss(self) -> Tensor | None:
        """The weighted sum of the terms, None where there are none."""
        total: Tensor | None = None
        for name, term in self.terms.items():
            # No product where the weight is one, so that a single term is passed on bit for bit.
            weighted = self.weights[name] * term if name in self.weights else term
            total = weighted if total is None else total + weighted
        return total


Counts = tuple[float, ...]
"""What each mean of a matching is over (spans, pairs of positions or tokens), in an order of the matching's own."""


@dataclass(frozen=True)
class Matching:
    """What is compared between two models, and how.

    What it gives are means, and shares, over the batch. Where a step is computed in micro-batches they must be over the
    whole step: then each micro-batch is given the step's counts, the sum of all its micro-batches' place by place, and
    its lessons are what it adds to the step's.

    Attributes:
        teach: as `__call__`.
        count: what the means over a batch are over; needs no forward pass.
    """

    teach: Callable[[Reading, Reading, Counts | None], tuple[Lesson, Lesson]]
    count: Callable[[EncodedBatch, EncodedBatch], Counts]

    def __call__(self, a: Reading, b: Reading, counts: Counts | None = None) -> tuple[Lesson, Lesson]:
        """What A learns from B, and B from A.

        Args:
            a: the first model's reading.
            b: the second's, of the same responses in the same order.
            counts: what the means are over; the batch's own if not given.

        Raises:
            ValueError: the readings hold different responses.
        """
        return self.teach(a, b, counts)


@dataclass(frozen=True)
class Direction:
    """One half of a symmetric matching; its lesson is one mean, of which see `Matching`.

    Attributes:
        teach: as `__call__`.
        count: what the mean over a batch is over, from the student's encoding and the teacher's.
    """

    teach: Callable[[Reading, Reading, float | None], Lesson]
    count: Callable[[EncodedBatch, EncodedBatch], int]

    def __call__(self, student: Reading, teacher: Reading, count: float | None = None) -> Lesson:
        """What the student learns from a teacher, which is a constant."""
        return self.teach(student, teacher, count)


def both_ways(a_from_b: Direction, b_from_a: Direction) -> Matching:
    """A matching of two directions, each with the other side detached; a side that does not learn costs nothing."""

    def teach(a: Reading, b: Reading, counts: Counts | None) -> tuple[Lesson, Lesson]:
        count_a, count_b = counts or (None, None)
        return (
            a_from_b(a, b.detached(), count_a) if a.learns else Lesson(),
            b_from_a(b, a.detached(), count_b) if b.learns else Lesson(),
        )

    def count(a: EncodedBatch, b: EncodedBatch) -> Counts:
        return a_from_b.count(a, b), b_from_a.count(b, a)

    return Matching(teach, count)


def log_probs(hidden_ND: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """`log softmax(logits / temperature)` of hidden rows, [N, V], float32 (float64 if the head is)."""
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    return (logits(hidden_ND, head) / temperature).log_softmax(-1)


def by_rows(values: Callable[..., Tensor], *rows: Tensor, rows_at_once: int = ROWS_AT_ONCE) -> Tensor:
    """`values` of a few rows at a time, put together again; what it computes inside is computed anew in the backward.

    So the logits of one chunk are held at a time, at the price of a second forward pass through the head (gradient
    checkpointing, arXiv 1604.06174).

    Args:
        values: takes as many tensors as `rows`, each with the same rows of them, and returns one value a row.
        rows: tensors of N rows each.
        rows_at_once: changes memory and speed, not the result.

    Returns:
        [N], with gradients to `rows` and to the tensors that `values` closes over.
    """
    chunks = zip(*(torch.split(tensor, rows_at_once) for tensor in rows), strict=True)
    parts: list[Tensor] = [
        checkpoint(values, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
    ]
    return torch.cat(parts)


def mean(values_N: Tensor, count: float | None = None) -> Tensor:
    """The sum over `count`, N if not given; 0 (with a gradient of nothing) where there are no values."""
    return values_N.sum() / max(len(values_N) if count is None else count, 1)
