"""Deals the public rows into those that every device gets, those that judge a version, and those that are learned from.

By a hash of each row's text and the run's seed: the same file gives the same split whatever the order of its lines, and
a row added later moves no other row's neighbours. Rows with equal text are one row, so that none is on two sides.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from cotuning.examples import Example


class TooFewRows(ValueError):
    """Public rows of which nothing would be left to train on.

    Attributes:
        expected, received: numbers of different rows.
    """

    def __init__(self, detail: str, *, expected: int, received: int) -> None:
        super().__init__(detail)
        self.expected = expected
        self.received = received


@dataclass(frozen=True)
class PublicRows:
    """The three parts of the public set; none shares a row with another."""

    probe: list[Example]
    """Q: what every device receives and answers with logits."""
    validation: list[Example]
    """Decides whether a version is promoted. Never trained on."""
    training: list[Example]
    """What the proxy is distilled on, and what the LLM and the proxy learn on together."""


def split_public_rows(
    rows: Iterable[Example], *, probe_rows: int, validation_rows: int, seed: int, source: str
) -> PublicRows:
    """Deal `rows` out: `validation_rows`, then `probe_rows`, the rest to training.

    Args:
        source: Where the rows come from, for the message.

    Raises:
        TooFewRows: nothing would be left to train on.
    """
    ordered = in_hashed_order(rows, seed)
    needed = validation_rows + probe_rows + 1
    if len(ordered) < needed:
        raise TooFewRows(
            f"{source}: expected at least {needed} different public rows ({validation_rows} to validate, {probe_rows} "
            f"to probe, 1 to train), got {len(ordered)}",
            expected=needed,
            received=len(ordered),
        )
    held_out = validation_rows + probe_rows
    return PublicRows(ordered[validation_rows:held_out], ordered[:validation_rows], ordered[held_out:])


def in_hashed_order(rows: Iterable[Example], seed: int) -> list[Example]:
    """Return the rows without repetitions, in an order that depends on their text and the seed alone."""
    return [row for _, row in sorted({_key(row, seed): row for row in rows}.items())]


def _key(row: Example, seed: int) -> str:
    digest = hashlib.sha256(str(seed).encode())
    for text in (row.instruction, row.input, row.output):
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
