"""Divergences of a student from a teacher over classes, with their slopes, in log space.

Names: N rows, C classes. p is the teacher, q the student; the teacher is a constant in every formula.

* forward KL: sum p log(p / q), mass covering (Hinton et al., arXiv 1503.02531);
* reverse KL: sum q log(q / p), mode seeking (MiniLLM, arXiv 2306.08543, per position and without sampling);
* generalised JSD(beta): beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649,
  equation 1). Bounded by log 2 at beta 0.5. As beta -> 0 it is beta KL(p || q), as beta -> 1 (1 - beta) KL(q || p): not
  rescaled here.
"""

from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

Comparison = tuple[Tensor, Tensor | None]
"""Values [N] in nats, and slopes [N, C] where they were asked for."""


def divergence_and_slope(
    teacher_log_probs_NC: Tensor, student_log_probs_NC: Tensor, divergence: Divergence, jsd_beta: float, *, slope: bool
) -> Comparison:
    """The divergence of each row and, if asked, its slope `q_c * df/dq_c` with the row's mean already taken out.

    "Mean taken out": `q_c (g_c - sum_d q_d g_d)` with g = df/dq, which is the gradient with respect to unnormalised
    log-probabilities of the classes. It sums to zero in every row.

    Args:
        teacher_log_probs_NC: finite, normalised.
        student_log_probs_NC: finite, normalised.
        divergence: which one.
        jsd_beta: the teacher's weight in JSD's mixture, in (0, 1); unused otherwise.
        slope: whether to compute the second result.

    Returns:
        values [N] in nats, and the slope [N, C] or None.
    """
    if divergence == "forward_kl":
        teacher_NC = teacher_log_probs_NC.exp()
        values_N = (teacher_NC * (teacher_log_probs_NC - student_log_probs_NC)).sum(-1)
        return values_N, student_log_probs_NC.exp().sub_(teacher_NC) if slope else None
    student_NC = student_log_probs_NC.exp()
    if divergence == "reverse_kl":
        ratio_NC = student_log_probs_NC - teacher_log_probs_NC
        values_N = (student_NC * ratio_NC).sum(-1)
        return values_N, ratio_NC.sub_(values_N[:, None]).mul_(student_NC) if slope else None
    if divergence == "jsd":
        return _jsd(teacher_log_probs_NC, student_log_probs_NC, student_NC, jsd_beta, slope)
    raise ValueError(f"expected divergence forward_kl, reverse_kl or jsd, got {divergence!r}")


def _jsd(
    teacher_log_probs_NC: Tensor, student_log_probs_NC: Tensor, student_NC: Tensor, beta: float, slope: bool
) -> Comparison:
    if not 0 < beta < 1:
        raise ValueError(f"expected jsd_beta strictly between 0 and 1, got {beta}")
    log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=torch.float64).log().tolist()
    mixture_NC = torch.logaddexp(teacher_log_probs_NC + log_beta, student_log_probs_NC + log_rest)
    student_part_NC = student_log_probs_NC - mixture_NC
    reverse_N = (student_NC * student_part_NC).sum(-1)
    forward_N = (teacher_log_probs_NC.exp() * (teacher_log_probs_NC - mixture_NC)).sum(-1)
    values_N = beta * forward_N + (1 - beta) * reverse_N
    if not slope:
        return values_N, None
    # df/dq = (1 - beta) log(q / m): the other terms of the derivative cancel.
    return values_N, student_part_NC.sub_(reverse_N[:, None]).mul_(student_NC).mul_(1 - beta)


def top_classes_kl_and_slope(
    teacher_ids_NK: Tensor,
    teacher_log_probs_NK: Tensor,
    teacher_tail_N: Tensor,
    student_log_probs_NC: Tensor,
    *,
    slope: bool,
) -> Comparison:
    """Forward KL over the teacher's K classes and one bucket for all others; the slope as `divergence_and_slope`.

    Args:
        teacher_ids_NK: distinct classes of each row.
        teacher_log_probs_NK: their log-probabilities, at most 0; with the tail they sum to one.
        teacher_tail_N: mass of all other classes, in [0, 1].
        student_log_probs_NC: finite, normalised.
        slope: whether to compute the second result.
    """
    student_NC = student_log_probs_NC.exp()
    teacher_NK = teacher_log_probs_NK.exp()
    student_NK = student_NC.gather(1, teacher_ids_NK)
    rest_NC = student_NC.scatter(1, teacher_ids_NK, 0.0)
    # Summed, not one minus the top: where the top holds nearly everything the difference would be rounding error.
    student_tail_N = rest_NC.sum(1).clamp_(min=torch.finfo(student_NC.dtype).tiny)
    top_N = (teacher_NK * (teacher_log_probs_NK - student_log_probs_NC.gather(1, teacher_ids_NK))).sum(1)
    values_N = top_N + torch.xlogy(teacher_tail_N, teacher_tail_N / student_tail_N)
    if not slope:
        return values_N, None
    slope_NC = rest_NC.mul_((1 - teacher_tail_N / student_tail_N)[:, None])
    return values_N, slope_NC.scatter_(1, teacher_ids_NK, student_NK - teacher_NK)
