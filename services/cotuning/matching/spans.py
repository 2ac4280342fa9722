"""Log-likelihoods of what stands in the spans that two tokenizations share.

Names: B rows, S spans, N tokens in spans, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cotuning.alignment import Alignment, align, token_spans
from cotuning.cross_entropy import response_tokens
from cotuning.encoding import EncodedBatch
from cotuning.matching.interface import Reading, by_rows, log_probs


@dataclass(frozen=True)
class SpanTokens:
    """The tokens of one side that lie in spans, END included, by row and position.

    Attributes:
        sample_N: row of the batch.
        position_N: position whose hidden state predicts the token (the token's own minus one).
        target_N: the token.
        span_N: the span it lies in, among S.
        is_last_N: whether it is its span's last token.
        count_S: tokens of each span.
    """

    sample_N: Tensor
    position_N: Tensor
    target_N: Tensor
    span_N: Tensor
    is_last_N: Tensor
    count_S: Tensor

    def take(self, chosen_N: Tensor) -> "SpanTokens":
        """Some of the tokens; `count_S` and `is_last_N` still say what they said of all."""
        return SpanTokens(
            self.sample_N[chosen_N],
            self.position_N[chosen_N],
            self.target_N[chosen_N],
            self.span_N[chosen_N],
            self.is_last_N[chosen_N],
            self.count_S,
        )


def span_tokens(batch: EncodedBatch, alignment: Alignment) -> SpanTokens:
    """Find them: for each span of `alignment`, the tokens of this side that spell its text; END for the END span."""
    tokens = response_tokens(batch)
    end_span_B = torch.full_like(batch.end_position_B, -1)
    end_S = alignment.is_end_S.nonzero().flatten()
    end_span_B[alignment.sample_S[end_S]] = end_S
    own_N = tokens.position_N + 1
    is_end_N = own_N == batch.end_position_B[tokens.sample_N]
    content_span_N = token_spans(batch, alignment)[tokens.sample_N, own_N]
    span_N = torch.where(is_end_N, end_span_B[tokens.sample_N], content_span_N)
    inside_N = span_N >= 0
    position_N, span_N = tokens.position_N[inside_N], span_N[inside_N]
    count_S = torch.bincount(span_N, minlength=alignment.num_spans)
    last_S = torch.full_like(alignment.sample_S, -1).scatter_reduce_(0, span_N, position_N, "amax")
    return SpanTokens(
        sample_N=tokens.sample_N[inside_N],
        position_N=position_N,
        target_N=tokens.target_N[inside_N],
        span_N=span_N,
        is_last_N=position_N == last_S[span_N],
        count_S=count_S,
    )


def count_spans(a: EncodedBatch, b: EncodedBatch) -> int:
    """Spans that two encodings of the same responses share."""
    return align(a, b).num_spans


def token_log_likelihoods(reading: Reading, tokens: SpanTokens, temperature: float = 1.0) -> Tensor:
    """`log p(token)` of each of them under the reading's model, softened by the temperature, [N], nats."""

    def values(hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        return log_probs(hidden_ND, reading.head, temperature).gather(1, target_N[:, None]).squeeze(1)

    return by_rows(values, reading.hidden_BTD[tokens.sample_N, tokens.position_N], tokens.target_N)


def sum_by_span(values_N: Tensor, tokens: SpanTokens) -> Tensor:
    """The sum over each span's tokens, [S]: of log-likelihoods, the span's own by the chain rule."""
    return values_N.new_zeros(len(tokens.count_S)).index_add(0, tokens.span_N, values_N)
