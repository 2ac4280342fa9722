"""Structure-agnostic alignment: where two tokenizations of one response meet, in bytes.

Names: B rows, T tokens, P byte positions, S span starts, one for each span that both models can be scored on.

Where both tokenizations end a token is a common boundary; a span between two neighbouring ones holds the same text on
both sides. At its start both models have read exactly the same bytes, so their next-token distributions are about the
same event; inside it they have not, and no distribution is matched there. Groups equal those of TRL's GOLD walker
(`_align_by_byte_offsets`), but the incomplete tail after the last common boundary is dropped, not glued, and a span's
distribution is read at its first token's position *minus one*: the logits at a position predict the next token.

Everything is a handful of tensor operations for a whole batch, linear in bytes, on whatever device the batches are.
End of turn is one more shared event: a span of no bytes after the last one, when neither side was truncated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cotuning.encoding import IGNORED_LABEL, EncodedBatch, encode_batch, response_digest
from cotuning.token_tables import TokenTable, token_table

__all__ = [
    "IGNORED_LABEL",
    "Alignment",
    "EncodedBatch",
    "TokenTable",
    "align",
    "encode_batch",
    "response_digest",
    "token_spans",
    "token_table",
]


@dataclass(frozen=True)
class Alignment:
    """The span starts of a batch, ordered by row and byte.

    Attributes:
        sample_S: the row of the batch.
        row_a_S, row_b_S: position whose logits predict the span's first token (that token's position minus one).
        byte_start_S, byte_end_S: the span's bytes in the response; equal for END.
        is_end_S: the span is the end of turn.
        covered_bytes: bytes in spans; 0-dim.
        total_bytes: bytes of the responses as far as both sides hold them (whole, for rows not aligned); 0-dim.
        skipped_B: rows left out because a side's byte ends are unknown.
        input_ids_a_BT, input_ids_b_BT: the batches' own.
    """

    sample_S: Tensor
    row_a_S: Tensor
    row_b_S: Tensor
    byte_start_S: Tensor
    byte_end_S: Tensor
    is_end_S: Tensor
    covered_bytes: Tensor
    total_bytes: Tensor
    skipped_B: Tensor
    input_ids_a_BT: Tensor
    input_ids_b_BT: Tensor

    @property
    def first_token_a_S(self) -> Tensor:  # noqa: N802 - a tensor, named by its shape
        """Id of each span's first observed token, side A."""
        return self.input_ids_a_BT[self.sample_S, self.row_a_S + 1]

    @property
    def first_token_b_S(self) -> Tensor:  # noqa: N802 - a tensor, named by its shape
        """Id of each span's first observed token, side B."""
        return self.input_ids_b_BT[self.sample_S, self.row_b_S + 1]

    @property
    def token_before_a_S(self) -> Tensor:  # noqa: N802 - a tensor, named by its shape
        """Id of the last token that was read before the span, side A."""
        return self.input_ids_a_BT[self.sample_S, self.row_a_S]

    @property
    def token_before_b_S(self) -> Tensor:  # noqa: N802 - a tensor, named by its shape
        """Id of the last token that was read before the span, side B."""
        return self.input_ids_b_BT[self.sample_S, self.row_b_S]

    @property
    def num_spans(self) -> int:
        """S."""
        return len(self.sample_S)

    @property
    def num_skipped(self) -> int:
        """Rows left out."""
        return int(self.skipped_B.sum())

    @property
    def coverage(self) -> float:
        """Share of the response bytes that lie in spans; 1 where there are no bytes."""
        total = int(self.total_bytes)
        return int(self.covered_bytes) / total if total else 1.0


def align(a: EncodedBatch, b: EncodedBatch) -> Alignment:
    """Find the common boundaries of two encodings of the same responses, row by row.

    Args:
        a: one model's batch.
        b: the other's; the same responses in the same order, on the same device.

    Raises:
        ValueError: the batches hold different responses.
    """
    _require_same_responses(a, b)
    skipped_B = ~(a.aligned_B & b.aligned_B)
    drops_text = a.drops_text or b.drops_text
    byte_J, place_a_J, place_b_J = _dropping_boundaries(a, b) if drops_text else _common_boundaries(a, b)
    width_a, width_b = a.closes_BT.shape[1] + 1, b.closes_BT.shape[1] + 1
    rows_B = torch.arange(len(skipped_B), device=skipped_B.device)
    stop_B = torch.searchsorted(place_a_J, (rows_B + 1) * width_a)
    count_B = stop_B.diff(prepend=stop_B.new_zeros(1))

    def spread(values_B: Tensor) -> Tensor:
        return values_B.repeat_interleave(count_B, output_size=len(byte_J))

    byte_J -= spread(a.first_bytes())
    row_a_J, row_b_J = place_a_J - spread(rows_B * width_a + 1), place_b_J - spread(rows_B * width_b + 1)
    found_R = count_B.nonzero().flatten()
    last_R = stop_B[found_R] - 1
    first_byte_R, last_byte_R = byte_J[last_R + 1 - count_B[found_R]], byte_J[last_R]
    # The next boundary of the same row; after a row's last one nothing is left but the turn's end.
    byte_end_J = byte_J.roll(-1).index_copy_(0, last_R, last_byte_R)
    is_end_R = (last_byte_R == a.num_bytes_B[found_R]) & ((a.end_position_B >= 0) & (b.end_position_B >= 0))[found_R]
    is_end_J = torch.zeros_like(byte_J, dtype=torch.bool).index_copy_(0, last_R, is_end_R)
    kept_J = (row_a_J >= 0) & (row_b_J >= 0)  # with no row before it nothing predicts a token
    if drops_text:  # text that one side drops is in a span without a token there
        kept_J &= ((place_a_J != place_a_J.roll(-1)) & (place_b_J != place_b_J.roll(-1))) | is_end_J
    if bool(skipped_B.any()):
        kept_J &= ~spread(skipped_B)
    kept_J.index_copy_(0, last_R, kept_J[last_R] & is_end_R)
    columns = [spread(rows_B), row_a_J, row_b_J, byte_J, byte_end_J, is_end_J]
    if not bool(kept_J.all()):
        kept_S = kept_J.nonzero().flatten()
        columns = [column_J.index_select(0, kept_S) for column_J in columns]
    sample_S, row_a_S, row_b_S, byte_start_S, byte_end_S, is_end_S = columns
    seen_B = torch.minimum(_bytes_seen(a), _bytes_seen(b))
    return Alignment(
        sample_S=sample_S,
        row_a_S=row_a_S,
        row_b_S=row_b_S,
        byte_start_S=byte_start_S,
        byte_end_S=byte_end_S,
        is_end_S=is_end_S,
        covered_bytes=((last_byte_R - first_byte_R) * ~skipped_B[found_R]).sum(),
        total_bytes=torch.where(skipped_B, a.num_bytes_B, seen_B).sum(),
        skipped_B=skipped_B,
        input_ids_a_BT=a.input_ids_BT,
        input_ids_b_BT=b.input_ids_BT,
    )


def _common_boundaries(a: EncodedBatch, b: EncodedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Where both sides end a token, J of them in order: places among all bytes, and each side's `closing_places` there.

    A bit for every byte says whether a side ends a token at it, and each side looks its tokens up in the other's bits:
    a byte a place, where `closing_places` takes eight. Neither side drops text, so no token ends at two bytes.
    """
    ends_a_U, ends_b_U = a.closing_bytes().flatten(), b.closing_bytes().flatten()
    place_a_J = _end_marks(b, ends_b_U).index_select(0, ends_a_U).nonzero().flatten()
    place_b_J = _end_marks(a, ends_a_U).index_select(0, ends_b_U).nonzero().flatten()
    return ends_a_U.index_select(0, place_a_J), place_a_J, place_b_J


def _end_marks(batch: EncodedBatch, ends_U: Tensor) -> Tensor:
    """Whether a token ends at each byte of `closing_places`, and one entry more for those that end nowhere."""
    marks_P = torch.zeros(batch.num_places + 1, dtype=torch.bool, device=ends_U.device)
    marks_P.scatter_(0, ends_U, torch.ones_like(ends_U, dtype=torch.bool))
    marks_P[-1] = False
    return marks_P


def _dropping_boundaries(a: EncodedBatch, b: EncodedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The same where a side drops text, all bytes of which are boundaries of one token."""
    place_a_P, place_b_P = a.closing_places(), b.closing_places()
    byte_J = (torch.minimum(place_a_P, place_b_P) >= 0).nonzero().flatten()
    return byte_J, place_a_P.index_select(0, byte_J), place_b_P.index_select(0, byte_J)


def _bytes_seen(batch: EncodedBatch) -> Tensor:
    """Bytes of each response that the row holds, [B]: fewer than all where it was truncated."""
    if not batch.byte_ends_BT.shape[1]:
        return batch.num_bytes_B
    return torch.where(batch.end_position_B >= 0, batch.num_bytes_B, batch.byte_ends_BT.amax(1))


def token_spans(batch: EncodedBatch, alignment: Alignment) -> Tensor:
    """Which span each content token of one side lies in.

    Returns:
        int64 [B, T]: the index among the S spans, -1 for tokens in none (outside the response, in the seam, after the
        last common boundary) and for END.
    """
    nowhere_BT = torch.full_like(batch.byte_ends_BT, -1)
    index_S = (~alignment.is_end_S).nonzero().flatten()
    if not len(index_S):
        return nowhere_BT
    first_B = batch.first_bytes()
    # A token that ends at byte e lies in the last span that starts before e, if it lies in one at all.
    starts_S = first_B[alignment.sample_S[index_S]] + alignment.byte_start_S[index_S]
    place_BT = first_B[:, None] + batch.byte_ends_BT
    span_BT = index_S[(torch.searchsorted(starts_S, place_BT) - 1).clamp(min=0)]
    rows_B1 = torch.arange(len(first_B), device=first_B.device)[:, None]
    inside_BT = (
        batch.content_mask_BT
        & (alignment.sample_S[span_BT] == rows_B1)
        & (batch.byte_ends_BT > alignment.byte_start_S[span_BT])
        & (batch.byte_ends_BT <= alignment.byte_end_S[span_BT])
    )
    return span_BT.where(inside_BT, nowhere_BT)


def _require_same_responses(a: EncodedBatch, b: EncodedBatch) -> None:
    if a.digest_B.shape != b.digest_B.shape:
        raise ValueError(f"expected as many rows on both sides, got {len(a.digest_B)} and {len(b.digest_B)}")
    different = (a.digest_B != b.digest_B).nonzero().flatten().tolist()
    if different:
        raise ValueError(f"expected the same responses on both sides; rows {different[:10]} differ")
