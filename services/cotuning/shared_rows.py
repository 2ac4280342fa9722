"""The rows that two models learn from each other on, each read with its own tokenizer, and how well these align.

Checked before any training: a pair of tokenizers that does not fit is refused with nothing spent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cotuning.alignment import align
from cotuning.encoded_rows import EncodedRows
from cotuning.folding import FoldPair, class_agreement, fold_pair

_MEASURED_AT_ONCE = 64


class CoverageTooLow(ValueError):
    """The two tokenizations cannot be aligned well enough to learn from.

    Attributes:
        measure: `coverage` or `class_agreement`.
        expected, received: the least accepted share and the measured one.
    """

    def __init__(self, measure: str, expected: float, received: float) -> None:
        super().__init__(
            f"alignment {measure}: expected at least {expected:.3f}, got {received:.3f}; nothing was trained"
        )
        self.measure = measure
        self.expected = expected
        self.received = received


@dataclass(frozen=True)
class AlignmentStats:
    """How well two tokenizations of the training rows could be aligned.

    Attributes:
        coverage: share of response bytes inside spans; rows that could not be aligned count as uncovered.
        class_agreement: share of text spans whose observed first tokens fall in the same class.
        num_spans: span starts, END included.
        skipped_rows: rows that keep only their cross-entropy.
    """

    coverage: float
    class_agreement: float
    num_spans: int
    skipped_rows: int


@dataclass(frozen=True)
class SharedRows:
    """What both parties read, each with its own tokenizer.

    Attributes:
        rows_a, rows_b: the same examples.
        batches: indices of the rows of each step.
        fold: of the two vocabularies.
        alignment: of all rows in `batches`.
    """

    rows_a: EncodedRows
    rows_b: EncodedRows
    batches: Sequence[Sequence[int]]
    fold: FoldPair
    alignment: AlignmentStats


def share_rows(
    rows_a: EncodedRows, rows_b: EncodedRows, batches: Sequence[Sequence[int]], *, min_coverage: float
) -> SharedRows:
    """Align the rows that will be drawn, and refuse to train on garbage.

    Raises:
        CoverageTooLow: coverage or class agreement is below `min_coverage`.
    """
    a, b = rows_a.lm, rows_b.lm
    fold = fold_pair(a.tokenizer, a.table, b.tokenizer, b.table).to(a.device)
    used = sorted({index for batch in batches for index in batch})
    stats = measure_alignment(rows_a, rows_b, fold, used)
    for measure in ("coverage", "class_agreement"):
        value = getattr(stats, measure)
        if value < min_coverage:
            raise CoverageTooLow(measure, min_coverage, value)
    return SharedRows(rows_a, rows_b, batches, fold, stats)


def measure_alignment(a: EncodedRows, b: EncodedRows, fold: FoldPair, indices: Sequence[int]) -> AlignmentStats:
    """Align the rows at `indices` and report how well that went."""
    covered = total = spans = text_spans = skipped = 0
    agreeing = 0.0
    a.encode(indices)
    b.encode(indices)
    for start in range(0, len(indices), _MEASURED_AT_ONCE):
        chunk = indices[start : start + _MEASURED_AT_ONCE]
        alignment = align(a.batch(chunk), b.batch(chunk))
        num_text = int((~alignment.is_end_S).sum())
        covered += int(alignment.covered_bytes)
        total += int(alignment.total_bytes)
        spans += alignment.num_spans
        skipped += alignment.num_skipped
        agreeing += class_agreement(alignment, fold) * num_text
        text_spans += num_text
    return AlignmentStats(
        coverage=covered / total if total else 1.0,
        class_agreement=agreeing / text_spans if text_spans else 1.0,
        num_spans=spans,
        skipped_rows=skipped,
    )
