"""Prompts and responses to token ids, with the byte of the response where each token ends.

Names: B rows, T tokens, N tokens of all rows flat, V token ids.

A response is always encoded together with its prompt, in one call: encoded alone it would get a dummy space from
metaspace tokenizers and other pieces at the seam. The byte ends come from the static table and a cumulative sum, and
are verified: the pieces' bytes must be the response's bytes. Rows where they are not (a normaliser changed the text,
a special token's text stands in the response) take the slower offset path; rows of a tokenizer that gives no offsets
stay `aligned=False`, for their cross-entropy only. Positions are never guessed.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cotuning.offsets import ends_from_offsets
from cotuning.token_tables import TokenTable

IGNORED_LABEL = -100
"""The label of positions without loss; the default `ignore_index` of `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class EncodedBatch:
    """B rows of prompt, response and end of turn, right-padded to T tokens.

    Attributes:
        input_ids_BT: int64; padding is the end id, under a zero attention mask.
        attention_mask_BT: int64, 1 on tokens.
        labels_BT: int64, the id itself on the response's tokens and END, else -100. Not shifted.
        content_mask_BT: bool, tokens that hold some of the response; without END.
        byte_ends_BT: int64, bytes of the response up to and including the token; 0 outside the response.
        closes_BT: bool, content tokens after which a common boundary may lie.
        byte_reaches_BT: int64, for closing tokens, the byte at which the next token begins: more than `byte_ends_BT`
            where the tokenizer drops text in between (WordPiece drops white space).
        start_row_B: int64, position of the token before the response, -1 if there is none.
        start_reaches_B: int64, the byte at which the response's first token begins; more than 0 where text is dropped.
        clean_start_B: bool, whether the response begins on a token boundary.
        end_position_B: int64, position of END, -1 if it was truncated away.
        num_bytes_B: int64, bytes of the whole response, truncated or not.
        aligned_B: bool, whether the byte ends of the row are known.
        digest_B: int64, the first 8 bytes of the response's SHA-256: equal texts on both sides are checked with it.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    labels_BT: Tensor
    content_mask_BT: Tensor
    byte_ends_BT: Tensor
    closes_BT: Tensor
    byte_reaches_BT: Tensor
    start_row_B: Tensor
    start_reaches_B: Tensor
    clean_start_B: Tensor
    end_position_B: Tensor
    num_bytes_B: Tensor
    aligned_B: Tensor
    digest_B: Tensor

    def left_padded(self) -> "EncodedBatch":
        """The same rows with their padding in front: every field, positions included, is moved with its token."""
        width = self.attention_mask_BT.shape[1]
        shift_B = width - self.attention_mask_BT.sum(1)
        source_BT = (torch.arange(width, device=shift_B.device) - shift_B[:, None]) % max(width, 1)
        moved = {
            field.name: getattr(self, field.name).gather(1, source_BT)
            for field in fields(self)
            if field.name.endswith("_BT")
        }
        # A row that begins with its response has its last padding before it, which predicts nothing: still -1.
        return replace(
            self,
            start_row_B=torch.where(self.start_row_B < 0, -1, self.start_row_B + shift_B),
            end_position_B=torch.where(self.end_position_B < 0, -1, self.end_position_B + shift_B),
            **moved,
        )

    def first_bytes(self) -> Tensor:
        """Where each row begins in `closing_positions`: [B]."""
        sizes_B = self.num_bytes_B + 1
        return sizes_B.cumsum(0) - sizes_B

    def closing_positions(self) -> Tensor:
        """For every byte of the responses, the position of the token after which the text up to that byte is read.

        Returns:
            int64, flat: `num_bytes + 1` entries a row, row after row. At byte 0 the token before the response: -1 if
            the response starts the row, so that nothing predicts its first token. -2 where no boundary is.
        """
        places_P = self.closing_places()
        return torch.where(places_P >= 0, places_P % (self.closes_BT.shape[1] + 1), -1) - 1

    def closing_places(self) -> Tensor:
        """The same with the row: `row * (T + 1) + position + 1`; -1 where no boundary is."""
        ends_BU = self.closing_bytes()
        token_BU = torch.arange(ends_BU.numel(), device=ends_BU.device).view_as(ends_BU)
        places_P = torch.full((self.num_places + 1,), -1, dtype=torch.int64, device=ends_BU.device)
        places_P.scatter_(0, ends_BU.flatten(), token_BU.flatten())
        if self.drops_text:
            # Dropped text is read as soon as what precedes it is: every byte of it is a boundary.
            dropped_BT = (self.byte_reaches_BT - self.byte_ends_BT) * self.closes_BT
            _fill(places_P, ends_BU[:, 1:].flatten(), dropped_BT.flatten(), token_BU[:, 1:].flatten())
            start_B = torch.where(self.clean_start_B, token_BU[:, 0] + self.start_row_B + 1, -1)
            _fill(places_P, self.first_bytes(), self.start_reaches_B, start_B)
        return places_P[:-1]

    def closing_bytes(self) -> Tensor:
        """The index in `closing_places` of the byte at which each token closes a boundary, `num_places` if at none.

        Returns:
            int64 [B, T + 1]: position `t` in column `t + 1`. The token before the response closes at its byte 0; where
            there is none, column 0 does.
        """
        num_rows, width = self.closes_BT.shape
        first_B1, nowhere = self.first_bytes()[:, None], self.num_bytes_B.new_full((), self.num_places)
        ends_BU = nowhere.repeat(num_rows, width + 1)
        # Every token writes, those without a boundary past the end: cheaper than to pick out the others first.
        torch.where(self.closes_BT, self.byte_ends_BT + first_B1, nowhere, out=ends_BU[:, 1:])
        return ends_BU.scatter_(
            1, self.start_row_B[:, None] + 1, torch.where(self.clean_start_B[:, None], first_B1, nowhere)
        )

    @property
    def num_places(self) -> int:
        """Entries of `closing_places`: `num_bytes + 1` a row."""
        return int(self.num_bytes_B.sum()) + len(self.num_bytes_B)

    @property
    def drops_text(self) -> bool:
        """Whether text lies between two tokens of a row, or before the first."""
        # `equal` need not look at one tensor twice, which they are where no row took the offset path.
        return not torch.equal(self.byte_reaches_BT, self.byte_ends_BT) or bool(self.start_reaches_B.any())

    def to(self, device: torch.device | str) -> "EncodedBatch":
        """The same batch on `device`."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def _fill(target_P: Tensor, first_K: Tensor, count_K: Tensor, values_K: Tensor) -> None:
    """Write `values_K[k]` to the `count_K[k]` places after `first_K[k]`."""
    index_Q = torch.arange(len(count_K), device=count_K.device).repeat_interleave(count_K)
    rank_Q = torch.arange(len(index_Q), device=count_K.device) - (count_K.cumsum(0) - count_K)[index_Q]
    target_P.scatter_(0, first_K[index_Q] + 1 + rank_Q, values_K[index_Q])


def response_digest(response: str) -> int:
    """The first 8 bytes of the SHA-256 of the response's UTF-8, as a signed integer (little-endian)."""
    return _digest(response.encode())


def encode_batch(
    tokenizer: Any, table: TokenTable, prompts: Sequence[str], responses: Sequence[str], *, max_length: int
) -> EncodedBatch:
    """Encode rows, right-padded; what is too long loses its prompt's head first, then its response's tail.

    The tokenizer's prefix (BOS) and at least one token before the response are kept.

    Args:
        tokenizer: a transformers tokenizer.
        table: its `token_table`.
        prompts: B rendered prompts; special tokens spelled in them count as special tokens.
        responses: B raw texts, without end of turn.
        max_length: tokens a row, at least 4.

    Raises:
        ValueError: unequal numbers of prompts and responses, a `max_length` below 4, or a lone surrogate in a text.
    """
    if len(prompts) != len(responses):
        raise ValueError(
            f"expected as many responses as prompts, got {len(prompts)} prompts, {len(responses)} responses"
        )
    if max_length < 4:
        raise ValueError(f"expected max_length of at least 4 tokens, got {max_length}")
    response_bytes = [_utf8(text, row) for row, text in enumerate(responses)]
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    _ = [_utf8(text, row) for row, text in enumerate(prompts)]
    encoding: Any = tokenizer(texts, add_special_tokens=False, verbose=False) if texts else {"input_ids": []}
    flat = _flatten(encoding["input_ids"], table, prompts, response_bytes)
    suspects = (~flat.aligned_B).nonzero().flatten().tolist()
    if suspects and getattr(tokenizer, "is_fast", False):
        _use_offsets(flat, suspects, [encoding.encodings[row].offsets for row in suspects], prompts, responses)
    elif suspects:
        _guess_content(flat, suspects, encoding["input_ids"], tokenizer, prompts)
    return _lay_out(flat, table, [_prefix(tokenizer, table, prompt) for prompt in prompts], response_bytes, max_length)


def _utf8(text: str, row: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"row {row}: expected text, got a lone surrogate at character {error.start}") from None


def _prefix(tokenizer: Any, table: TokenTable, prompt: str) -> tuple[int, ...]:
    """The ids to put first, unless the prompt (a chat template) spells them itself."""
    if not table.prefix_ids:
        return ()
    spelled = tokenizer.convert_ids_to_tokens(table.prefix_ids[0])
    return () if prompt.startswith(spelled) else table.prefix_ids


@dataclass
class _FlatBatch:
    """All rows' tokens one after the other, before prefix, END, truncation and padding."""

    ids_N: Tensor
    row_N: Tensor
    lengths_B: Tensor
    byte_ends_N: Tensor
    content_N: Tensor
    closes_N: Tensor
    byte_reaches_N: Tensor
    start_reaches_B: Tensor
    clean_start_B: Tensor
    num_bytes_B: Tensor
    aligned_B: Tensor

    def first_tokens(self) -> Tensor:
        """Index [B] of each row's first token."""
        return self.lengths_B.cumsum(0) - self.lengths_B


def _flatten(
    rows: Sequence[Sequence[int]], table: TokenTable, prompts: Sequence[str], responses: Sequence[bytes]
) -> _FlatBatch:
    """Byte ends by cumulative sum, counted from each row's end, and verified against the response's bytes."""
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    ids_N = _joined(rows)
    row_N = torch.arange(len(rows)).repeat_interleave(lengths_B)
    num_bytes_B = torch.tensor([len(response) for response in responses], dtype=torch.int64)
    sizes_N = table.byte_lengths_V.index_select(0, ids_N)
    byte_ends_N = byte_ends(sizes_N, lengths_B, num_bytes_B)
    content_N = (byte_ends_N > 0) & (sizes_N > 0)
    straddles_N = content_N & (byte_ends_N < sizes_N)
    clean_B = torch.ones(len(rows), dtype=torch.bool)
    clean_B[row_N[straddles_N]] = False
    aligned = [table.exact and _spells(row, table, response) for row, response in zip(rows, responses, strict=True)]
    return _FlatBatch(
        ids_N=ids_N,
        row_N=row_N,
        lengths_B=lengths_B,
        byte_ends_N=byte_ends_N,
        content_N=content_N,
        closes_N=content_N.clone(),
        byte_reaches_N=byte_ends_N.clone(),
        start_reaches_B=torch.zeros_like(num_bytes_B),
        # Before an empty prompt only a dummy space can straddle, and that is no text.
        clean_start_B=clean_B | torch.tensor([not prompt for prompt in prompts], dtype=torch.bool),
        num_bytes_B=num_bytes_B,
        aligned_B=torch.tensor(aligned, dtype=torch.bool),
    )


def byte_ends(sizes_N: Tensor, lengths_B: Tensor, num_bytes_B: Tensor) -> Tensor:
    """Bytes of its response up to and including each token; at most 0 in the prompt.

    Args:
        sizes_N: `TokenTable.byte_lengths_V` of the ids of all rows, one row after the other.
        lengths_B: tokens of each row.
        num_bytes_B: bytes of each response, which ends its row.
    """
    total_M = sizes_N.new_empty(len(sizes_N) + 1)  # one more, for what precedes the first row
    total_M[0] = 0
    torch.cumsum(sizes_N, 0, out=total_M[1:])
    before_B = total_M.index_select(0, lengths_B.cumsum(0)) - num_bytes_B
    return total_M[1:].sub_(before_B.repeat_interleave(lengths_B, output_size=len(sizes_N)))


def _joined(rows: Sequence[Sequence[int]]) -> Tensor:
    """All ids one after the other; an array in between, because `torch.tensor` of a list is four times slower."""
    ids = array("q")
    for row in rows:
        ids.extend(row)
    return torch.frombuffer(ids, dtype=torch.int64) if ids else torch.zeros(0, dtype=torch.int64)


def _spells(row: Sequence[int], table: TokenTable, response: bytes) -> bool:
    """Whether the ids' bytes end in the response's, byte for byte; what comes before is prompt or a dummy space."""
    return b"".join(map(table.spelled.__getitem__, row)).endswith(response)


def _use_offsets(
    flat: _FlatBatch,
    suspects: Sequence[int],
    offsets: Sequence[Sequence[tuple[int, int]]],
    prompts: Sequence[str],
    responses: Sequence[str],
) -> None:
    """Replace the byte ends of the `suspects` by those of their character offsets."""
    ends = ends_from_offsets(offsets, [prompts[row] for row in suspects], [responses[row] for row in suspects])
    rows_R = torch.tensor(suspects)
    real_RT = torch.arange(ends.content_RT.shape[1]) < flat.lengths_B[rows_R][:, None]
    chosen_N = torch.zeros_like(flat.aligned_B).index_fill_(0, rows_R, True)[flat.row_N]
    flat.byte_ends_N[chosen_N] = ends.byte_ends_RT[real_RT]
    flat.content_N[chosen_N] = ends.content_RT[real_RT]
    flat.closes_N[chosen_N] = ends.closes_RT[real_RT]
    flat.byte_reaches_N[chosen_N] = ends.byte_reaches_RT[real_RT]
    flat.start_reaches_B[rows_R] = ends.start_reaches_R
    flat.clean_start_B[rows_R] = ends.clean_start_R
    flat.aligned_B[rows_R] = True


def _guess_content(
    flat: _FlatBatch, suspects: Sequence[int], rows: Sequence[Sequence[int]], tokenizer: Any, prompts: Sequence[str]
) -> None:
    """Without offsets: what follows the prompt's own tokens is response, good enough for cross-entropy only."""
    for row in suspects:
        alone = tokenizer(prompts[row], add_special_tokens=False, verbose=False)["input_ids"]
        shared = 0
        while shared < min(len(alone), len(rows[row])) and alone[shared] == rows[row][shared]:
            shared += 1
        start = int(flat.first_tokens()[row])
        stop = start + int(flat.lengths_B[row])
        flat.content_N[start:stop] = torch.arange(stop - start) >= shared
        flat.closes_N[start:stop] = False
        flat.byte_ends_N[start:stop] = 0


class _Cut(NamedTuple):
    """How many tokens of each row stay, in the order in which they stand there; `dropped_B` of its prompt do not."""

    prefix_B: Tensor
    prompt_B: Tensor
    content_B: Tensor
    has_end_B: Tensor
    dropped_B: Tensor


def _truncate(flat: _FlatBatch, prefix_B: Tensor, max_length: int) -> _Cut:
    """The prompt's head goes first, all but a token where there is no prefix; then END, then the response's tail."""
    content_B = torch.zeros_like(prefix_B).index_add_(0, flat.row_N, flat.content_N.long())
    prompt_B = flat.lengths_B - content_B
    keep_min_B = torch.where(prefix_B > 0, 0, prompt_B.clamp(max=1))
    kept_B = (max_length - prefix_B - content_B - 1).maximum(keep_min_B).minimum(prompt_B)
    room_B = max_length - prefix_B - kept_B
    return _Cut(prefix_B, kept_B, content_B.minimum(room_B).clamp(min=0), content_B < room_B, prompt_B - kept_B)


def _lay_out(
    flat: _FlatBatch,
    table: TokenTable,
    prefixes: Sequence[tuple[int, ...]],
    responses: Sequence[bytes],
    max_length: int,
) -> EncodedBatch:
    """Truncate, put prefix and END around each row, and pad on the right."""
    num_rows = len(prefixes)
    cut = _truncate(flat, torch.tensor([len(prefix) for prefix in prefixes], dtype=torch.int64), max_length)
    total_B = cut.prefix_B + cut.prompt_B + cut.content_B + cut.has_end_B.long()
    width = int(total_B.max()) if num_rows else 0
    place_N = torch.arange(len(flat.ids_N)) - (flat.first_tokens() + cut.dropped_B)[flat.row_N]
    kept_N = (place_N >= 0) & (place_N < (cut.prompt_B + cut.content_B)[flat.row_N])
    source_M = kept_N.nonzero().flatten()
    target_M = (flat.row_N * width + place_N + cut.prefix_B[flat.row_N]).index_select(0, source_M)

    def spread(values_N: Tensor, fill: int) -> Tensor:
        grid_BT = torch.full((num_rows, width), fill, dtype=values_N.dtype)
        grid_BT.flatten().scatter_(0, target_M, values_N.index_select(0, source_M))
        return grid_BT

    input_ids_BT = spread(flat.ids_N, table.end_id)  # END and padding are the same id: no separate write
    for row, prefix in enumerate(prefixes):
        if prefix:
            input_ids_BT[row, : len(prefix)] = torch.tensor(prefix)
    content_mask_BT = spread(flat.content_N, 0)
    end_position_B = torch.where(cut.has_end_B, total_B - 1, -1)
    attention_BT = torch.arange(width) < total_B[:, None]
    byte_ends_BT = spread(flat.byte_ends_N, 0) * content_mask_BT
    same = torch.equal(flat.byte_reaches_N, flat.byte_ends_N)
    labelled_BT = content_mask_BT | (torch.arange(width) == end_position_B[:, None])
    return EncodedBatch(
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_BT.long(),
        labels_BT=input_ids_BT.where(labelled_BT, IGNORED_LABEL),
        content_mask_BT=content_mask_BT,
        byte_ends_BT=byte_ends_BT,
        closes_BT=spread(flat.closes_N, 0),
        byte_reaches_BT=byte_ends_BT if same else spread(flat.byte_reaches_N, 0) * content_mask_BT,
        start_reaches_B=flat.start_reaches_B,
        start_row_B=cut.prefix_B + cut.prompt_B - 1,
        clean_start_B=flat.clean_start_B,
        end_position_B=end_position_B,
        num_bytes_B=flat.num_bytes_B,
        aligned_B=flat.aligned_B,
        digest_B=torch.tensor([_digest(response) for response in responses], dtype=torch.int64),
    )


def _digest(response: bytes) -> int:
    return int.from_bytes(hashlib.sha256(response).digest()[:8], "little", signed=True)
