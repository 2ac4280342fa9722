"""Folding two vocabularies onto a common coarsening, so that their distributions can be compared at all.

Names: V token ids of one tokenizer, M classes.

The classes are the byte strings that both vocabularies hold, END, and OTHER. Each id u of either side belongs to
exactly one class c(u), so pushing a softmax forward is a sum by class, `p~(c) = sum_{u: c(u) = c} p(u)`: a proper
distribution, with no renormalisation, no tail and no suppressed ids, and KL between two of them is a true divergence
(data-processing inequality: never more than on a finer common view). Replaces the string equality and sorted tails of
ULD and GOLD.

A token that the other side lacks goes where the *other* tokenizer would go: to the class of the first piece that it
gives the token's text, followed until a shared string is reached. So when one side reads " international" and the
other " inter", "national", both first tokens fall in the same class by construction. What no piece is known for
(fragments of UTF-8) goes to its longest shared prefix; what has none, and every special token, to OTHER.

Where a tokenizer's first piece depends on what comes later (Unigram reads " self" but " ", "self."), the classes it
chooses between are one class: less is told apart, and nothing false is taught.

Where one side drops white space (WordPiece), its word "is" stands for " is" and for "is", which the other side may cut
differently (" is", but "i", "s"). One map cannot serve both, and a map coarse enough for both would leave little more
than first letters. So such a pair has two folds, and what precedes a span, which both models have read, says which:
after white space or an opening mark a word begins without a space (`unspaced`), anywhere else with one.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cotuning.alignment import Alignment
from cotuning.token_tables import TokenTable, stands_alone

_MAX_CHAIN = 64
# Put before a token's text, so that no tokenizer adds a dummy space to it; the next where one would merge with it.
_SENTINELS = ("\n", "a", "")
# In the middle of a word, where it matters whether a piece continues one: few pieces join a digit and a letter.
_SENTINELS_IN_WORDS = ("0", "a", "\n", "")
_MARK = b"."
_WORD_AND_MARK = re.compile(rb"[A-Za-z]\.")


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
        fingerprint: SHA-256 over both tables and all maps, hex.
        unspaced: the fold of spans after a break, with classes of its own; None where one fold serves all spans.
        breaks_a_V, breaks_b_V: bool, ids after which a word begins without a space; None without `unspaced`.
    """

    map_a_V: Tensor
    map_b_V: Tensor
    num_classes: int
    end_class: int
    other_class: int
    num_shared: int
    identical: bool
    fingerprint: str
    unspaced: "FoldPair | None" = None
    breaks_a_V: Tensor | None = None
    breaks_b_V: Tensor | None = None

    def to(self, device: torch.device | str) -> "FoldPair":
        """The same maps on `device`."""
        return replace(
            self,
            map_a_V=self.map_a_V.to(device),
            map_b_V=self.map_b_V.to(device),
            unspaced=None if self.unspaced is None else self.unspaced.to(device),
            breaks_a_V=None if self.breaks_a_V is None else self.breaks_a_V.to(device),
            breaks_b_V=None if self.breaks_b_V is None else self.breaks_b_V.to(device),
        )

    def after_break(self, alignment: Alignment) -> Tensor | None:
        """Which spans [S] are folded by `unspaced`; None where one fold serves all."""
        if self.breaks_a_V is None or self.breaks_b_V is None:
            return None
        return self.breaks_a_V[alignment.token_before_a_S] | self.breaks_b_V[alignment.token_before_b_S]

    def parts(self, after_break_S: Tensor | None, num_spans: int) -> list[tuple["FoldPair", Tensor | slice]]:
        """Each fold in use with the index of its spans.

        Args:
            after_break_S: from `after_break`.
            num_spans: S.

        Raises:
            ValueError: no `after_break_S` of that length, and the fold has two parts.
        """
        if self.unspaced is None:
            return [(self, slice(None))]
        if after_break_S is None or after_break_S.shape != (num_spans,):
            received = "none" if after_break_S is None else f"shape {list(after_break_S.shape)}"
            raise ValueError(f"expected after_break_S of {num_spans} spans for a fold in two parts, got {received}")
        return [(self, (~after_break_S).nonzero().flatten()), (self.unspaced, after_break_S.nonzero().flatten())]


@dataclass(frozen=True)
class _Side:
    """One vocabulary as it is compared.

    Attributes:
        texts: what each id stands for; None for specials.
        keys: the same, None also for ids that are not to be shared by equality.
    """

    tokenizer: Any
    table: TokenTable
    texts: Sequence[bytes | None]
    keys: Sequence[bytes | None]


def fold_pair(tokenizer_a: Any, table_a: TokenTable, tokenizer_b: Any, table_b: TokenTable) -> FoldPair:
    """Build both maps. Deterministic."""
    if table_a.fingerprint == table_b.fingerprint:
        return _identical(table_a)
    inputs = ((tokenizer_a, table_a), (tokenizer_b, table_b))
    sides = [_Side(tokenizer, table, table.pieces, table.pieces) for tokenizer, table in inputs]
    if table_a.exact == table_b.exact:
        return _fold(sides[0], sides[1], _SENTINELS)
    spaced = _fold(sides[0], sides[1], _SENTINELS_IN_WORDS)
    sides = [side if side.table.exact else _without_spaces(side) for side in sides]
    unspaced = _fold(sides[0], sides[1], _SENTINELS)
    return replace(
        spaced,
        unspaced=unspaced,
        breaks_a_V=_breaks(table_a),
        breaks_b_V=_breaks(table_b),
        fingerprint=hashlib.sha256(f"{spaced.fingerprint} {unspaced.fingerprint}".encode()).hexdigest(),
    )


def _fold(a: _Side, b: _Side, sentinels: Sequence[str]) -> FoldPair:
    shared = sorted({key for key in a.keys if key} & {key for key in b.keys if key})
    class_of = {key: index for index, key in enumerate(shared)}
    end_class, other_class = len(shared), len(shared) + 1
    num_a = a.table.num_tokens
    classes: list[int] = []
    pointers: list[int] = []
    for side, other, shift in ((a, b, num_a), (b, a, 0)):  # ids of side B come after those of side A
        known = [
            class_of.get(key or b"", -1) if text else other_class
            for key, text in zip(side.keys, side.texts, strict=True)
        ]
        known[side.table.end_id] = end_class
        first = _first_pieces(side.texts, known, other.tokenizer, sentinels)
        known_ids = [text is not None for text in other.texts]
        pointers += [piece + shift if piece is not None and known_ids[piece] else -1 for piece in first]
        classes += known
    texts_U = [text or b"" for text in (*a.texts, *b.texts)]
    classes_U, pointers_U = torch.tensor(classes), torch.tensor(pointers)
    _use_prefixes(classes_U, (classes_U < 0) & (pointers_U < 0), texts_U, class_of, other_class)
    classes_U = _follow(classes_U, pointers_U)
    _use_prefixes(classes_U, classes_U < 0, texts_U, class_of, other_class)  # cycles, which normalisers can make
    if _depends_on_what_follows(a) or _depends_on_what_follows(b):
        classes_U = _merge_unsteady(classes_U, (a, b), num_classes=other_class + 1)
        end_class, other_class = int(classes_U[a.table.end_id]), int(classes_U.max())
    maps = [classes_U[:num_a], classes_U[num_a:]]
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
        fingerprint=_fingerprint(a.table, b.table, maps),
    )


def class_agreement(alignment: Alignment, fold: FoldPair) -> float:
    """Share of text spans whose observed first tokens fall in the same class on both sides; 1 without spans.

    Below about 0.8 the fold does not describe this pair of tokenizers and distillation would teach noise.
    """
    class_a_S, class_b_S, _ = _observed_classes(alignment, fold)
    return float((class_a_S == class_b_S).double().mean()) if len(class_a_S) else 1.0


def other_share(alignment: Alignment, fold: FoldPair) -> float:
    """Share of text spans where both observed first tokens fall in OTHER: they agree, but on nothing; 0 without spans.

    Large where one vocabulary lacks what the text is written in and has no bytes to write it with.
    """
    class_a_S, class_b_S, other_S = _observed_classes(alignment, fold)
    both_S = (class_a_S == other_S) & (class_b_S == other_S)
    return float(both_S.double().mean()) if len(both_S) else 0.0


def _observed_classes(alignment: Alignment, fold: FoldPair) -> tuple[Tensor, Tensor, Tensor]:
    """The classes of both sides' first tokens of the text spans, and OTHER in the fold of each."""
    first_a_S, first_b_S = alignment.first_token_a_S, alignment.first_token_b_S
    class_a_S, class_b_S = fold.map_a_V[first_a_S], fold.map_b_V[first_b_S]
    other_S = torch.full_like(class_a_S, fold.other_class)
    after_break_S = fold.after_break(alignment)
    if fold.unspaced is not None and after_break_S is not None:
        class_a_S = fold.unspaced.map_a_V[first_a_S].where(after_break_S, class_a_S)
        class_b_S = fold.unspaced.map_b_V[first_b_S].where(after_break_S, class_b_S)
        other_S[after_break_S] = fold.unspaced.other_class
    text_S = ~alignment.is_end_S
    return class_a_S[text_S], class_b_S[text_S], other_S[text_S]


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


def _without_spaces(side: _Side) -> _Side:
    """The side's words as they stand after a break; pieces that continue a word cannot stand there."""
    texts = [None if text is None else text.removeprefix(b" ") for text in side.texts]
    if not any(text is not None and text.startswith(b" ") for text in side.texts):
        return side  # marks where words end, not where they begin: any piece may be the first
    begins = [text is not None and (text.startswith(b" ") or stands_alone(text.decode()[:1])) for text in side.texts]
    keys = [text if may_begin else None for text, may_begin in zip(texts, begins, strict=True)]
    return replace(side, texts=texts, keys=keys)


def _breaks(table: TokenTable) -> Tensor:
    """Ids [V] after which a word begins without a space: white space, opening marks, connectors, symbols, specials.

    After letters, digits and closing marks a space comes first. Pieces without white space never end in it, so for
    the side that drops it only the marks count.
    """
    return torch.tensor([piece is None or _is_break(piece) for piece in table.pieces], dtype=torch.bool)


def _is_break(piece: bytes) -> bool:
    last = piece.decode(errors="replace")[-1:]
    # Po holds closing marks (".", ",", "?") and others ("/", "&", "@", "#"); a quote opens as often as it closes.
    closing = last in ".,;:!?%…。、，" or unicodedata.category(last or " ") in ("Pe", "Pf")
    return last.isspace() or (not closing and unicodedata.category(last or " ")[0] in "PS" and last != "\ufffd")


def _first_pieces(
    texts: Sequence[bytes | None], known: Sequence[int], other: Any, sentinels: Sequence[str]
) -> list[int | None]:
    """For each id without a class, the first id that the other tokenizer gives its text; None where unknown."""
    first: list[int | None] = [None] * len(texts)
    waiting: dict[int, str] = {}
    for index, text in enumerate(texts):
        if known[index] < 0 and text:
            try:
                waiting[index] = text.decode()
            except UnicodeDecodeError:
                continue  # a fragment of a character: only a prefix can tell
    for sentinel in sentinels:
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


def _depends_on_what_follows(side: _Side) -> bool:
    """Whether a word may be cut otherwise before a mark: only where some piece holds the end of a word and the mark."""
    return any(_WORD_AND_MARK.search(text) for text in side.texts if text)


def _merge_unsteady(classes_U: Tensor, sides: tuple[_Side, _Side], *, num_classes: int) -> Tensor:
    """Make one class of those between which the other tokenizer chooses by what comes later; the rest keep their order.

    A Unigram model reads " self" as one piece and " self." as " ", "self.": whatever reads " self" must then agree
    with both. Each id's text is given to the other tokenizer with a mark behind it, and the class of the first piece
    is merged with the id's own. OTHER, the last class, and END are left alone.
    """
    parent = list(range(num_classes))
    classes = classes_U.tolist()

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    num_a = sides[0].table.num_tokens
    for side, other, start, other_start in ((*sides, 0, num_a), (*sides[::-1], num_a, 0)):
        if not _depends_on_what_follows(other):
            continue
        marked = [None if text is None else text + _MARK for text in side.texts]
        first = _first_pieces(marked, [-1] * len(marked), other.tokenizer, _SENTINELS[:1])
        for index, piece in enumerate(first):
            if piece is not None:
                pair = root(classes[start + index]), root(classes[other_start + piece])
                if max(pair) < num_classes - 2:
                    parent[max(pair)] = min(pair)
    roots_M = torch.tensor([root(index) for index in range(num_classes)])
    _, compact_M = torch.unique(roots_M, return_inverse=True)
    merged_U: Tensor = compact_M[classes_U]
    return merged_U


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
