"""Approximate likelihood matching (ALM, arXiv 2503.20083): the likelihoods of spans of the same text.

A span's likelihood under a model is the product of its tokens' probabilities, comparable whatever the tokens are. It is
made a distribution over two events, this text or any other, softened by a temperature tau (`p^(1/tau)`), and the two
are compared by an f-divergence:

    loss = mean over spans of D_f( [p_t^(1/tau), 1 - p_t^(1/tau)] || [p_s^(1/tau), 1 - p_s^(1/tau)] )

Differs from the paper: no correction for tokenization bias (a span whose text could go on inside a token), END is one
more span, and the reference implementation's binary *cross-entropy* is here a divergence: the same gradient for the
forward KL, and zero for equal models. As there, tau^2 does not enter.

Names: S spans.
"""

from typing import Literal

import torch
from torch import Tensor

from cotuning.alignment import align
from cotuning.divergences import Divergence, divergence_and_slope
from cotuning.encoding import EncodedBatch
from cotuning.matching.interface import Direction, Lesson, Reading, mean
from cotuning.matching.spans import SpanTokens, count_spans, span_tokens, sum_by_span, token_log_likelihoods

_CERTAIN = -1e-6
"""Log-likelihoods above it are taken for it: the other event must keep a probability that float32 can hold."""

_LOG_HALF = -0.6931471805599453


def binary_divergence(
    student_S: Tensor,
    teacher_S: Tensor,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
) -> Tensor:
    """The divergence of each span's two events, [S], nats.

    Args:
        student_S: log-likelihoods, at most 0.
        teacher_S: likewise, constants.
        temperature: tau, above 0.
        divergence: teacher to student.
        jsd_beta: for `jsd`.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    student_S2, teacher_S2 = (_two_events(logs_S / temperature) for logs_S in (student_S, teacher_S))
    return divergence_and_slope(teacher_S2, student_S2, divergence, jsd_beta, slope=False)[0]


def _two_events(logs_S: Tensor) -> Tensor:
    """`[s, log(1 - exp s)]`, by the form that loses no digits on each side of one half (Maechler 2012)."""
    logs_S = logs_S.clamp(max=_CERTAIN)
    near_one_S = logs_S > _LOG_HALF
    # Each branch gets a harmless argument where it is not used: a NaN there would come through in the gradient.
    near_S = torch.log(-torch.expm1(logs_S.where(near_one_S, _LOG_HALF)))
    far_S = torch.log1p(-torch.exp(logs_S.where(~near_one_S, _LOG_HALF)))
    return torch.stack([logs_S, torch.where(near_one_S, near_S, far_S)], 1)


def span_likelihood(
    *,
    temperature: float,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    spans: Literal["all", "several_tokens"] = "all",
    name: str = "alm",
) -> Direction:
    """The direction; the mean of `binary_divergence` over spans.

    Args:
        temperature: tau.
        divergence: of the two events.
        jsd_beta: for `jsd`.
        spans: `several_tokens` leaves out the spans that are one token on both sides, where a loss on distributions
            says the same and more.
        name: under which it is reported.
    """

    def teach(student: Reading, teacher: Reading, num_spans: float | None) -> Lesson:
        sides = _both_sides(student.batch, teacher.batch)
        logs = [
            sum_by_span(token_log_likelihoods(reading, tokens), tokens)
            for reading, tokens in zip((student, teacher), sides, strict=True)
        ]
        values_S = binary_divergence(
            logs[0], logs[1], temperature=temperature, divergence=divergence, jsd_beta=jsd_beta
        )
        if spans == "several_tokens":
            values_S = values_S[_has_several(sides)]
        return Lesson({name: mean(values_S, num_spans)})

    def count(student: EncodedBatch, teacher: EncodedBatch) -> int:
        if spans == "all":
            return count_spans(student, teacher)
        return int(_has_several(_both_sides(student, teacher)).sum())

    return Direction(teach, count)


def _both_sides(a: EncodedBatch, b: EncodedBatch) -> tuple[SpanTokens, SpanTokens]:
    alignment = align(a, b)
    return span_tokens(a, alignment), span_tokens(b, alignment)


def _has_several(sides: tuple[SpanTokens, SpanTokens]) -> Tensor:
    """Which spans are more than one token on a side, [S]."""
    return sides[0].count_S + sides[1].count_S > 2
