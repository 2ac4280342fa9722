"""Whether text that is trained on holds what is kept for devices or for testing: a gate before any claim.

A protected row counts as held by a text when, both normalised (`words`),

- the text is the row: its input and output, with or without its instruction before them (`exact`);
- the text shares 13 words in a row with the row's input and output (`shared_words`), the length that GPT-3's authors
  used (arXiv 2005.14165, appendix C); or
- the row is shorter than that and the text holds it whole, one word after the other: input and output where they are
  six words or more, else the instruction before them too (`whole`). Two or three words alone occur by chance.

Labels at the start of a line (`Input:`, `Answer:` ...) are no words, so that the rendering of a row does not matter.
Instructions are shared by all rows of a task and are not searched for by themselves. Imports no torch.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from cotuning.examples import Example

SHARED_WORDS = 13
FEWEST_WORDS = 6
"""Of input and output, so that they are looked for without their instruction."""

_LABELS = re.compile(
    r"^[ \t]*(?:instruction|input|output|question|answer|context|prompt|completion|response|user|assistant)[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_WORDS = re.compile(r"\w+")
_REPORTED_TEXTS = 2000

Kind = Literal["exact", "shared_words", "whole"]


@dataclass(frozen=True)
class Finding:
    """A text that holds a protected row.

    Attributes:
        place: of the text among those that were searched.
        row: id of the protected row.
        kind: how it is held.
        words: what was found, normalised.
    """

    place: int
    row: str
    kind: Kind
    words: str


def words(text: str) -> list[str]:
    """The words of a text as they are compared: NFKC, case folded, without punctuation and labels."""
    return _WORDS.findall(unicodedata.normalize("NFKC", _LABELS.sub(" ", text)).casefold())


def text_of(row: Example) -> str:
    """A row as a text to be searched: what a model that is trained on it reads."""
    return "\n".join(part for part in (row.instruction, row.input, row.output) if part)


class ProtectedRows:
    """Rows that no training text may hold, ready to be looked for in many texts.

    Args:
        rows: with ids that tell a person where they are.
        shared_words: words in a row that are too many to be chance.

    Raises:
        ValueError: `shared_words` is too small.
    """

    def __init__(self, rows: Iterable[Example], *, shared_words: int = SHARED_WORDS) -> None:
        if shared_words < 2:
            raise ValueError(f"expected shared_words of at least 2, got {shared_words}")
        self._size = shared_words
        self._exact: dict[str, str] = {}
        self._sequences: dict[str, str] = {}
        short: dict[tuple[str, ...], str] = {}
        self.num_rows = 0
        for row in rows:
            self.num_rows += 1
            own = words(f"{row.input}\n{row.output}")
            asked = words(text_of(row))
            for form in (own, asked):
                self._exact.setdefault(" ".join(form), row.id)
            for start in range(len(own) - shared_words + 1):
                self._sequences.setdefault(" ".join(own[start : start + shared_words]), row.id)
            if len(own) < shared_words:
                whole = own if len(own) >= FEWEST_WORDS else asked
                short.setdefault(tuple(whole), row.id)
        self._short = _by_rarest_pair(short)

    def find(self, text: str, place: int = 0) -> Finding | None:
        """The first protected row that the text holds; None if it holds none."""
        found = words(text)
        joined = " ".join(found)
        if (row := self._exact.get(joined)) is not None:
            return Finding(place, row, "exact", joined)
        size, sequences, short = self._size, self._sequences, self._short
        for start in range(len(found) - 1):
            pair = (found[start], found[start + 1])
            for offset, whole, row in short.get(pair, ()):
                if start >= offset and tuple(found[start - offset : start - offset + len(whole)]) == whole:
                    return Finding(place, row, "whole", " ".join(whole))
            sequence = " ".join(found[start : start + size])
            if sequence in sequences:
                return Finding(place, sequences[sequence], "shared_words", sequence)
        return None

    def find_all(self, texts: Sequence[str], on_text: Callable[[int, int], None] | None = None) -> Iterator[Finding]:
        """At most one finding a text, in order.

        Args:
            texts: To search.
            on_text: Told now and then how many of how many texts are searched; may raise to stop.
        """
        for place, text in enumerate(texts):
            if on_text and place % _REPORTED_TEXTS == 0:
                on_text(place, len(texts))
            if (finding := self.find(text, place)) is not None:
                yield finding
        if on_text:
            on_text(len(texts), len(texts))


def _by_rarest_pair(
    wholes: dict[tuple[str, ...], str],
) -> dict[tuple[str, str], list[tuple[int, tuple[str, ...], str]]]:
    """Word sequences by two neighbouring words of theirs that few others have: so that few are compared at a place.

    A sequence of one word is left out; such rows are found as `exact` only.
    """
    counts = Counter(pair for whole in wholes for pair in pairwise(whole))
    indexed: dict[tuple[str, str], list[tuple[int, tuple[str, ...], str]]] = {}
    for whole, row in wholes.items():
        pairs = list(pairwise(whole))
        if pairs:
            offset = min(range(len(pairs)), key=lambda index: (counts[pairs[index]], index))
            indexed.setdefault(pairs[offset], []).append((offset, whole, row))
    return indexed
