"""Cross-entropy over response tokens from hidden states, without ever holding all logits.

Names: B rows, T tokens, N response tokens of a batch, D hidden size, V token ids.

Labels are shifted by one: the hidden state at a position predicts the next token. Mean per token over the batch, nats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cotuning.encoding import IGNORED_LABEL, EncodedBatch
from cotuning.heads import FoldedHead, Head

DEFAULT_CHUNK_ROWS = 512


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of a batch, END included, that something before them can predict.

    Attributes:
        sample_N: row of the batch.
        position_N: position whose hidden state predicts the token (the token's own minus one).
        target_N: the token.
    """

    sample_N: Tensor
    position_N: Tensor
    target_N: Tensor


def response_tokens(batch: EncodedBatch) -> ResponseTokens:
    """Find them, in order of rows and positions."""
    next_BT = batch.labels_BT[:, 1:]
    sample_N, position_N = (next_BT != IGNORED_LABEL).nonzero(as_tuple=True)
    return ResponseTokens(sample_N, position_N, next_BT[sample_N, position_N])


def cross_entropy(
    hidden_ND: Tensor,
    head: Head,
    target_N: Tensor,
    *,
    num_tokens: float | None = None,
    label_smoothing: float = 0.0,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of `target_N`, and each token's.

    The gradient is formed chunk by chunk in the forward pass (see `heads`): one backward pass a call.

    Args:
        hidden_ND: hidden states that predict the targets.
        head: their model's head.
        target_N: token ids.
        num_tokens: what the sum is divided by, N if not given. Under gradient accumulation give the number of tokens
            of all micro-batches, so that the result does not depend on how the batch is cut.
        label_smoothing: s of Szegedy et al. (arXiv 1512.00567, section 7): the target's share is 1 - s, and s is dealt
            evenly to all V ids, the target among them.
        chunk_rows: rows projected at a time; changes memory and speed, not the result.

    Returns:
        The mean (0 where N is 0), which carries the gradient; and [N] values that do not. Nats.
    """
    num_tokens = max(len(target_N) if num_tokens is None else num_tokens, 1)
    side = FoldedHead(hidden_ND, head, None, head.num_tokens, temperature=1.0, scale=1.0 / num_tokens)
    parts: list[Tensor] = []
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        for start in range(0, len(target_N), chunk_rows):
            rows = slice(start, start + chunk_rows)
            log_probs_NV = side.class_log_probs(rows)
            losses_N = -log_probs_NV.gather(1, target_N[rows, None]).squeeze(1)
            if label_smoothing:
                losses_N = (1 - label_smoothing) * losses_N - label_smoothing * log_probs_NV.mean(-1)
            side.add_loss(losses_N, None)
            parts.append(losses_N)
            if side.learns:
                slope_NV = log_probs_NV.exp()
                if label_smoothing:
                    slope_NV -= label_smoothing / head.num_tokens
                slope_NV[torch.arange(len(losses_N), device=slope_NV.device), target_N[rows]] -= 1.0 - label_smoothing
                side.accumulate(rows, slope_NV, log_probs_NV, None)
    return side.loss(), torch.cat(parts) if parts else hidden_ND.new_zeros(0)
