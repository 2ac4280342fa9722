"""Distillation from what a teacher thinks, not only from what it says: hidden states, and relations between them.

Names: S span starts, D student's hidden size, E teacher's, B rows, R span starts of the longest row.

Both read the hidden states at span starts, where teacher and student have read the same bytes whatever their
tokenizers (`alignment`). The teacher is a constant. Layers are mapped evenly, the last to the last:
`m(l) = round(l L_teacher / L_student)`, as TinyBERT (arXiv 1909.10351) maps every third one of twelve to one of four.

* feature: `mean_l |H_l W_l - G_m(l)|^2 / |G_m(l)|^2`: a learned linear map W_l takes the student's states H_l to the
  teacher's space (FitNets, arXiv 1412.6550; TinyBERT, equation 8, `MSE(H W, G)`). Ours: the squared error is divided
  by the teacher's own size, so that one weight suits every layer and model. The maps are used in training only.
* relation: `mean_{s != t} huber(cos(h_s, h_t) - cos(g_s, g_t))` over pairs of span starts of a row (relational
  knowledge distillation, arXiv 1904.05068, section 3.2; ours: a cosine of two states for its potentials, distances of
  two and angles of three). It needs no map, since similarities have no dimension."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, normalize

from cotuning.seeding import derive_seed


def map_layers(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Which hidden states are compared: pairs of indices, 0 for the embedding's output, of student and teacher."""
    return [(index, round(index * teacher_layers / student_layers)) for index in range(1, student_layers + 1)]


def fresh_projections(sizes: Sequence[tuple[int, int]], *, seed: int, device: torch.device) -> list[Tensor]:
    """A map [D, E] for each pair of sizes, float32, of about unit gain, requiring gradients."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "projections"))
    return [
        (torch.randn(mine, theirs, generator=generator) / mine**0.5).to(device).requires_grad_()
        for mine, theirs in sizes
    ]


def feature_loss(
    student_SD: Sequence[Tensor], teacher_SE: Sequence[Tensor], projections_DE: Sequence[Tensor]
) -> Tensor:
    """Mean over layers of `||h_s W - h_t||^2 / ||h_t||^2`, norms over all span starts and dimensions; 0-dim, float32.

    Args:
        student_SD: hidden states of each mapped layer.
        teacher_SE: the same spans; no gradient reaches them.
        projections_DE: W of each layer.

    Raises:
        ValueError: unequal numbers of layers.
    """
    losses = []
    for student, teacher, projection_DE in zip(student_SD, teacher_SE, projections_DE, strict=True):
        kind = _kind(student)
        target_SE = teacher.detach().to(kind)
        error_SE = student.to(kind) @ projection_DE.to(kind) - target_SE
        losses.append(error_SE.square().sum() / target_SE.square().sum().clamp(min=torch.finfo(kind).tiny))
    return torch.stack(losses).mean()


def relation_loss(student_SD: Sequence[Tensor], teacher_SE: Sequence[Tensor], sample_S: Tensor) -> Tensor:
    """Mean over layers and over ordered pairs of different span starts of a row; 0-dim, float32.

    Of each pair, the Huber loss (delta 1) between the student's and the teacher's cosine similarity.

    Args:
        student_SD: hidden states of each mapped layer.
        teacher_SE: the same spans; no gradient reaches them.
        sample_S: row of each span start, ascending.

    Raises:
        ValueError: unequal numbers of layers.
    """
    row_S, place_S = _places(sample_S)
    shape = (int(row_S.max()) + 1, int(place_S.max()) + 1) if len(row_S) else (0, 0)
    valid_BR = torch.zeros(shape, dtype=torch.bool, device=sample_S.device)
    valid_BR[row_S, place_S] = True
    pairs_BRR = valid_BR[:, :, None] & valid_BR[:, None, :]
    pairs_BRR &= ~torch.eye(shape[1], dtype=torch.bool, device=sample_S.device)
    count = pairs_BRR.sum().clamp(min=1)
    losses = []
    for student, teacher in zip(student_SD, teacher_SE, strict=True):
        kind = _kind(student)
        mine_BRR, target_BRR = (
            _similarities(states.to(kind), row_S, place_S, shape) for states in (student, teacher.detach())
        )
        losses.append((huber_loss(mine_BRR, target_BRR, reduction="none") * pairs_BRR).sum() / count)
    return torch.stack(losses).mean()


def _similarities(states_SD: Tensor, row_S: Tensor, place_S: Tensor, shape: tuple[int, int]) -> Tensor:
    """Cosine similarities [B, R, R] within each row, zero where a row has no span start."""
    unit_SD = normalize(states_SD, dim=1)
    unit_BRD = unit_SD.new_zeros(*shape, unit_SD.shape[1]).index_put((row_S, place_S), unit_SD)
    return unit_BRD @ unit_BRD.mT


def _places(sample_S: Tensor) -> tuple[Tensor, Tensor]:
    """Rows counted from 0 without gaps, and the place of each span start in its row."""
    _, row_S, counts_B = torch.unique(sample_S, return_inverse=True, return_counts=True)
    first_B = counts_B.cumsum(0) - counts_B
    return row_S, torch.arange(len(sample_S), device=sample_S.device) - first_B[row_S]


def _kind(student: Tensor) -> torch.dtype:
    return torch.promote_types(student.dtype, torch.float32)
