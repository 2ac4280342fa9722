"""Folding two vocabularies onto a common coarsening, so that their distributions can be compared at all.

Names: V token ids of one tokenizer, M classes.

The classes are the byte strings that both vocabularies hold, END, and OTHER. Each id of either side belongs to exactly
one class, so pushing a softmax forward is a sum by class: a proper distribution, with no renormalisation, no tail and
no suppressed ids, and KL between two of them is a true divergence (data-processing inequality: never more than on a
finer common view). Replaces the string equality and sorted tails of ULD and GOLD.

A token that the other side lacks goes where the *other* tokenizer would go: to the class of the first piece that it
gives the token's text, followed until a shared string is reached. So when one side reads " international" and the
other " inter", "national", both first tokens fall in the same class by construction. What no piece is known for
(fragments of UTF-8) goes to its longest shared prefix; what has none, and every special token, to OTHER.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cotuning.alignment import Alignment
from cotuning.token_tables import TokenTable

_MAX_CHAIN = 64
# Put before a token's text, so that no tokenizer adds a dummy space to it; the second where the first would merge.
_SENTINELS = ("\n", "a", "")


@dataclass(frozen=True)
class FoldPair:
    """Two maps from token ids to shared classes.

    Attributes:
        map_a_V: class of each id of side A; int64.
        map_b_V: class of each id of side B; int64.
        num_classes: M.
        end_class: the class of both ends of turn.
        other_class: the class of specials and of what has no counterpart; equal to `end_class` where one side would
            have nothing in it (a class that one side cannot reach would make a KL infinite).
        num_shared: how many byte strings both vocabularies hold.
        identical: both tables are the same: classes are the ids themselves and nothing is folded.
        fingerprint: SHA-256 over both tables and both maps, hex.
    """

    map_a_V: Tensor
    map_b_V: Tensor
    num_classes: int
    end_class: int
    other_class: int
    num_shared: int
    identical: bool
    fingerprint: str

    def to(self, device: torch.device | str) -> "FoldPair":
        """The same maps on `device`."""
        return replace(self, map_a_V=self.map_a_V.to(device), map_b_V=self.map_b_V.to(device))


def fold_pair(tokenizer_a: Any, table_a: TokenTable, tokenizer_b: Any, table_b: TokenTable) -> FoldPair:
    """Build both maps. Deterministic; about one second for vocabularies of 32k and 150k."""
    if table_a.fingerprint == table_b.fingerprint:
        return _identical(table_a)
    spaces_count = table_a.exact and table_b.exact
    keys_a, keys_b = _class_keys(table_a, spaces_count), _class_keys(table_b, spaces_count)
    shared = sorted({key for key in keys_a if key} & {key for key in keys_b if key})
    class_of = {key: index for index, key in enumerate(shared)}
    end_class, other_class = len(shared), len(shared) + 1
    sides = ((table_a, keys_a, tokenizer_b, table_b), (table_b, keys_b, tokenizer_a, table_a))
    classes: list[int] = []
    pointers: list[int] = []
    for side, (table, keys, other_tokenizer, other_table) in enumerate(sides):
        known = [class_of.get(key, -1) if key else other_class for key in keys]
        known[table.end_id] = end_class
        first = _first_pieces(table, known, other_tokenizer)
        shift = table_a.num_tokens if side == 0 else 0  # ids of side B come after those of side A
        known_ids = [piece is not None for piece in other_table.pieces]
        pointers += [piece + shift if piece is not None and known_ids[piece] else -1 for piece in first]
        classes += known
    keys_U = keys_a + keys_b
    classes_U, pointers_U = torch.tensor(classes), torch.tensor(pointers)
    _use_prefixes(classes_U, (classes_U < 0) & (pointers_U < 0), keys_U, class_of, other_class)
    classes_U = _follow(classes_U, pointers_U)
    _use_prefixes(classes_U, classes_U < 0, keys_U, class_of, other_class)  # cycles, which normalisers can make
    maps = [classes_U[: table_a.num_tokens], classes_U[table_a.num_tokens :]]
    reachable = all(bool((map_V == other_class).any()) for map_V in maps)
    if not reachable:
        maps = [map_V.where(map_V != other_class, end_class) for map_V in maps]
        other_class = end_class
    return FoldPair(
        map_a_V=maps[0],
        map_b_V=maps[1],
        num_classes=other_class + 1,
        end_class=end_class,
        other_class=other_class,
        num_shared=len(shared),
        identical=False,
        fingerprint=_fingerprint(table_a, table_b, maps),
    )


def class_agreement(alignment: Alignment, fold: FoldPair) -> float:
    """Share of text spans whose observed first tokens fall in the same class on both sides; 1 without spans.

    Below about 0.8 the fold does not describe this pair of tokenizers and distillation would teach noise.
    """
    text_S = ~alignment.is_end_S
    class_a_S = fold.map_a_V[alignment.first_token_a_S[text_S]]
    class_b_S = fold.map_b_V[alignment.first_token_b_S[text_S]]
    return float((class_a_S == class_b_S).double().mean()) if len(class_a_S) else 1.0


def _identical(table: TokenTable) -> FoldPair:
    map_V = torch.arange(table.num_tokens)
    return FoldPair(
        map_a_V=map_V,
        map_b_V=map_V,
        num_classes=table.num_tokens,
        end_class=table.end_id,
        other_class=table.end_id,
        num_shared=table.num_tokens,
        identical=True,
        fingerprint=_fingerprint(table, table, [map_V, map_V]),
    )


def _class_keys(table: TokenTable, spaces_count: bool) -> list[bytes]:
    """What is compared across vocabularies: the piece, empty for specials.

    Where one side drops white space, leading white space is dropped from both: that side says "to" whether a space
    comes before it or not, so telling " to" from "to" would be telling apart what it cannot.
    """
    pieces = (piece or b"" for piece in table.pieces)
    return list(pieces) if spaces_count else [piece.lstrip() for piece in pieces]


def _first_pieces(table: TokenTable, known: Sequence[int], other: Any) -> list[int | None]:
    """For each id without a class, the first id that the other tokenizer gives its text; None where unknown."""
    first: list[int | None] = [None] * table.num_tokens
    waiting: dict[int, str] = {}
    for index, piece in enumerate(table.pieces):
        if known[index] < 0 and piece:
            try:
                waiting[index] = piece.decode()
            except UnicodeDecodeError:
                continue  # a fragment of a character: only a prefix can tell
    for sentinel in _SENTINELS:
        if not waiting:
            break
        found = _first_after(other, sentinel, list(waiting.values()))
        for index, piece_id in zip(list(waiting), found, strict=True):
            if piece_id is not None:
                first[index] = piece_id
                del waiting[index]
    return first


def _first_after(tokenizer: Any, sentinel: str, texts: Sequence[str]) -> list[int | None]:
    """The first token after `sentinel` in each text, None where a token holds some of both."""
    inputs = [sentinel + text for text in texts]
    encoding = tokenizer(inputs, add_special_tokens=False, verbose=False)
    seam = len(sentinel)
    found: list[int | None] = []
    if not getattr(tokenizer, "is_fast", False):
        head = tokenizer(sentinel, add_special_tokens=False, verbose=False)["input_ids"] if sentinel else []
        for ids in encoding["input_ids"]:
            clean = len(ids) > len(head) and ids[: len(head)] == head
            found.append(int(ids[len(head)]) if clean else None)
        return found
    for row in encoding.encodings:
        after = ((index, start) for index, (start, end) in zip(row.ids, row.offsets, strict=True) if end > seam)
        index, start = next(after, (None, 0))
        found.append(index if index is not None and start >= seam else None)
    return found


def _follow(classes_U: Tensor, pointers_U: Tensor) -> Tensor:
    """Give every id without a class that of the id it points to, until nothing changes; cycles keep -1."""
    for _ in range(_MAX_CHAIN):
        open_U = (classes_U < 0) & (pointers_U >= 0)
        reached_U = torch.where(open_U, classes_U[pointers_U.clamp(min=0)], classes_U)
        if torch.equal(reached_U, classes_U):
            break
        classes_U = reached_U
    return classes_U


def _use_prefixes(
    classes_U: Tensor,
    chosen_U: Tensor,
    keys_U: Sequence[bytes],
    class_of: dict[bytes, int],
    other_class: int,
) -> None:
    """Write the class of the longest shared prefix, else OTHER, for the chosen ids."""
    for index in chosen_U.nonzero().flatten().tolist():
        key = keys_U[index]
        prefixes = (class_of.get(key[:length]) for length in range(len(key), 0, -1))
        classes_U[index] = next((found for found in prefixes if found is not None), other_class)


def _fingerprint(table_a: TokenTable, table_b: TokenTable, maps: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(f"cotune-fold-1 {table_a.fingerprint} {table_b.fingerprint}\n".encode())
    for map_V in maps:
        digest.update(map_V.to(torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()
