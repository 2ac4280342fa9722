"""The K most probable classes of a model's distributions, with the mass of all the others.

Names: S rows, K classes kept, C classes, V tokens, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cotuning.heads import FoldedHead, Head


@dataclass(frozen=True)
class TopClasses:
    """The K most probable classes of S distributions.

    Attributes:
        ids_SK: int64, distinct in a row, most probable first.
        log_probs_SK: float32.
        tail_S: float32, mass of all other classes.
    """

    ids_SK: Tensor
    log_probs_SK: Tensor
    tail_S: Tensor


def top_classes(
    hidden_SD: Tensor,
    head: Head,
    *,
    k: int,
    map_V: Tensor | None = None,
    num_classes: int | None = None,
    temperature: float = 1.0,
    chunk_rows: int = 128,
) -> TopClasses:
    """The top classes of a model at S positions, projected chunk by chunk; no gradient.

    Args:
        hidden_SD: hidden states at the span starts' rows.
        head: the model's head.
        k: classes to keep, at most C of them.
        map_V: fold onto classes, None for the token ids themselves.
        num_classes: C, with `map_V`.
        temperature: of the softmax.
        chunk_rows: rows at a time.
    """
    total = head.num_tokens if num_classes is None else num_classes
    side = FoldedHead(hidden_SD.detach(), head, map_V, total, temperature=temperature, scale=0.0)
    with side.forward_only():
        parts = [keep_top(side.class_log_probs(rows), k) for rows, _ in side.chunks(chunk_rows, None)]
    if not parts:
        return keep_top(torch.zeros(0, total, device=hidden_SD.device), k)
    return TopClasses(
        torch.cat([part.ids_SK for part in parts]),
        torch.cat([part.log_probs_SK for part in parts]),
        torch.cat([part.tail_S for part in parts]),
    )


def keep_top(log_probs_SC: Tensor, k: int) -> TopClasses:
    """The `min(k, C)` greatest of each row, and the mass of the rest (summed, not subtracted)."""
    log_probs_SK, ids_SK = log_probs_SC.topk(min(k, log_probs_SC.shape[1]), dim=1)
    tail_S = log_probs_SC.exp().scatter_(1, ids_SK, 0.0).sum(1)
    return TopClasses(ids_SK, log_probs_SK.float(), tail_S.float().clamp(0, 1))
