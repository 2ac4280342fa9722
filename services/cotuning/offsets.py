"""Byte ends from a tokenizer's character offsets, for responses whose text its normaliser changed.

Slower than the static table (`encoding`), and needed where NFKC, lower-casing or WordPiece make the pieces spell
something else than the text. Offsets count characters of the *original* text. Names: R rows, T tokens, C characters.

Two rules, each needed:

* a token closes a boundary only if every later token starts at or after its end. This glues together the pieces of
  one character (byte fallback, one half as "1", "⁄", "2", ligatures) and a dummy prefix, whose offsets overlap;
* a boundary is never put before a character that composes with the one before it (combining marks, Hangul vowels and
  tails, half-width voicing marks): `tokenizers` gives a *composed* character the offset of its first source character
  only (huggingface/tokenizers issue 1201), so such a boundary would split a character in two.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

_FAR = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class OffsetEnds:
    """Where each token of R rows ends in its response.

    Attributes:
        byte_ends_RT: bytes of the response up to and including the token; at most 0 in the prompt.
        content_RT: the token holds some of the response.
        closes_RT: a boundary: every byte before `byte_ends_RT` is in this token or an earlier one.
        byte_reaches_RT: where the next token begins, `byte_ends_RT` unless the tokenizer dropped text in between.
        clean_start_R: no token holds both prompt and response.
        start_reaches_R: where the first token begins: how much the tokenizer dropped at the response's start.
    """

    byte_ends_RT: Tensor
    content_RT: Tensor
    closes_RT: Tensor
    byte_reaches_RT: Tensor
    clean_start_R: Tensor
    start_reaches_R: Tensor


def ends_from_offsets(
    offsets: Sequence[Sequence[tuple[int, int]]], prompts: Sequence[str], responses: Sequence[str]
) -> OffsetEnds:
    """Byte ends of every token of `prompts[r] + responses[r]`, rows right-padded to the longest.

    Args:
        offsets: per row, each token's (start, end) in characters of `prompts[r] + responses[r]`.
        prompts: R texts.
        responses: R texts.
    """
    num_rows = len(offsets)
    longest = max((len(row) for row in offsets), default=0)
    spans_RT2 = torch.zeros(num_rows, longest, 2, dtype=torch.int64)
    real_RT = torch.zeros(num_rows, longest, dtype=torch.bool)
    lengths_R = torch.tensor([len(row) for row in offsets], dtype=torch.int64)
    real_RT[torch.arange(longest) < lengths_R[:, None]] = True
    spans_RT2[real_RT] = torch.tensor(list(chain.from_iterable(offsets)), dtype=torch.int64).reshape(-1, 2)
    prompt_R1 = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)[:, None]
    starts_RT, ends_RT = (spans_RT2 - prompt_R1[..., None]).unbind(-1)
    characters = _ResponseCharacters(responses)
    ends_RT = characters.extend(ends_RT)
    content_RT = real_RT & (ends_RT > 0)
    # Column 0 stands for the prompt, the last for the end of the text.
    edge_R1 = characters.num_characters_R[:, None]
    starts_RU = torch.cat([starts_RT.where(content_RT, _FAR), edge_R1], 1)
    ends_RU = torch.cat([torch.zeros_like(edge_R1), ends_RT.where(content_RT, 0)], 1).cummax(1).values
    next_start_RU = starts_RU.flip(1).cummin(1).values.flip(1)
    next_end_RT = torch.cat([ends_RU[:, 2:].where(content_RT[:, 1:], _FAR), torch.full_like(edge_R1, _FAR)], 1)
    ends_RT, reaches_RT = ends_RU[:, 1:], next_start_RU[:, 1:]
    closes_RT = content_RT & (ends_RT <= reaches_RT) & (next_end_RT[:, : ends_RT.shape[1]] > ends_RT)
    clean_R = (next_start_RU[:, 0] >= 0) | (prompt_R1[:, 0] == 0)
    return OffsetEnds(
        byte_ends_RT=characters.to_bytes(ends_RT),
        content_RT=content_RT,
        closes_RT=closes_RT,
        byte_reaches_RT=characters.to_bytes(reaches_RT),
        clean_start_R=clean_R,
        start_reaches_R=characters.to_bytes(next_start_RU[:, :1])[:, 0],
    )


class _ResponseCharacters:
    """The characters of R responses, flat: their byte positions and which of them may not begin a span."""

    def __init__(self, responses: Sequence[str]) -> None:
        codes_C = torch.frombuffer(
            bytearray("".join(responses).encode("utf-32-le") + b"\0" * 4), dtype=torch.int32
        ).long()
        self.num_characters_R = torch.tensor([len(response) for response in responses], dtype=torch.int64)
        self._starts_R1 = (self.num_characters_R.cumsum(0) - self.num_characters_R)[:, None]
        widths_C = 1 + (codes_C >= 0x80).long() + (codes_C >= 0x800).long() + (codes_C >= 0x10000).long()
        self._bytes_before_C = widths_C.cumsum(0) - widths_C
        unique_U, index_C = torch.unique(codes_C, return_inverse=True)
        joins_U = torch.tensor([_joins_previous(chr(code)) for code in unique_U.tolist()], dtype=torch.bool)
        positions_C = torch.arange(len(codes_C))
        self._next_start_C = positions_C.where(~joins_U[index_C], _FAR).flip(0).cummin(0).values.flip(0)

    def extend(self, ends_RT: Tensor) -> Tensor:
        """Move each end over the characters that compose with the one before; ends in the prompt stay."""
        limit_R1 = self.num_characters_R[:, None]
        flat_RT = self._starts_R1 + ends_RT.clamp(min=0).minimum(limit_R1)
        extended_RT = (self._next_start_C[flat_RT] - self._starts_R1).minimum(limit_R1)
        return torch.where((ends_RT >= 0) & (ends_RT < limit_R1), extended_RT, ends_RT)

    def to_bytes(self, ends_RT: Tensor) -> Tensor:
        """Characters of the response to bytes of it."""
        flat_RT = self._starts_R1 + ends_RT.clamp(min=0).minimum(self.num_characters_R[:, None])
        return self._bytes_before_C[flat_RT] - self._bytes_before_C[self._starts_R1]


@lru_cache(maxsize=65_536)
def _joins_previous(character: str) -> bool:
    """Whether some normalisation form may fuse `character` with the one before it."""
    if 0xD800 <= ord(character) <= 0xDFFF:
        return False
    first = unicodedata.normalize("NFKD", character)[0]
    hangul = "\u1160" <= first <= "\u11ff" or "\ud7b0" <= first <= "\ud7ff"
    return hangul or unicodedata.category(first).startswith("M")
