"""What a model scored on a set of rows, row by row, in a form that JSON holds and that can be paired."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from assets.data import examples_to_jsonl
from cotuning.evaluation import RowMeasurements, measure_rows
from cotuning.examples import Example
from cotuning.generation import DEFAULT_MAX_LENGTH, OnRows
from cotuning.language_model import LanguageModel
from simulation.errors import MeasurementError

Metric = Literal["rouge_l", "exact_match", "bits_per_byte"]
METRICS: tuple[Metric, ...] = ("rouge_l", "exact_match", "bits_per_byte")

METRIC_NAMES: Mapping[Metric, str] = {
    "rouge_l": "Rouge-L",
    "exact_match": "exact match, %",
    "bits_per_byte": "bits per byte",
}

_DIGITS = 4
"""Decimals that are kept: far below what a row's score means, and a third of the bytes of all."""


def sign(metric: Metric) -> int:
    """1 where more is better, -1 where less is."""
    return -1 if metric == "bits_per_byte" else 1


class Record(BaseModel):
    """What is written to a file and read back: frozen, exact about its fields, no number that JSON lacks."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RowScores(Record):
    """One model on one set of rows; the four lists have the order of the rows."""

    rows: str = Field(min_length=1, description="Name of the set: equal names mean equal rows in one experiment.")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the rows with all accepted answers.")
    rouge_l: tuple[float, ...] = Field(description="0-100, the best reference counting.")
    exact_match: tuple[Literal[0, 1], ...]
    bits: tuple[float, ...] = Field(description="Of the response and its END.")
    num_bytes: tuple[int, ...] = Field(description="Of the response, UTF-8.")

    @model_validator(mode="after")
    def _one_value_a_row(self) -> Self:
        lengths = [len(each) for each in (self.rouge_l, self.exact_match, self.bits, self.num_bytes)]
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ValueError(f"expected as many values of each kind, at least one, got {lengths}")
        if any(not 0 <= each <= 100 + 1e-3 for each in self.rouge_l):
            raise ValueError(f"expected Rouge-L from 0 to 100, got {min(self.rouge_l)} to {max(self.rouge_l)}")
        if min(self.bits) < 0 or min(self.num_bytes) < 0 or not sum(self.num_bytes):
            raise ValueError(
                f"expected bits and bytes of at least 0, some bytes above, got {min(self.bits)} bits and "
                f"{sum(self.num_bytes)} bytes in all"
            )
        return self

    @property
    def num_rows(self) -> int:
        """Rows measured."""
        return len(self.bits)

    def parts(self, metric: Metric) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Two arrays [rows]: over any rows the metric is the sum of the first over the sum of the second."""
        ones = np.ones(self.num_rows)
        if metric == "rouge_l":
            return np.array(self.rouge_l), ones
        if metric == "exact_match":
            return 100.0 * np.array(self.exact_match), ones
        return np.array(self.bits), np.array(self.num_bytes, dtype=np.float64)

    def mean(self, metric: Metric) -> float:
        """The metric over all rows; bits per byte is all bits over all bytes."""
        above, below = self.parts(metric)
        return float(above.sum() / below.sum())


def row_scores(measured: RowMeasurements, rows: Sequence[Example], *, name: str) -> RowScores:
    """Bring measurements of `rows` into the form that is kept.

    Raises:
        MeasurementError: a model gave no finite number for a row; names the row.
    """
    if odd := [row.id for row, bits in zip(rows, measured.bits, strict=True) if not math.isfinite(bits)]:
        raise MeasurementError(f"expected finite bits for each row of {name}, got others for {', '.join(odd[:5])}")
    return RowScores(
        rows=name,
        digest=hashlib.sha256(examples_to_jsonl(rows)).hexdigest(),
        rouge_l=tuple(round(each, _DIGITS) for each in measured.rouge_l),
        exact_match=tuple(1 if each else 0 for each in measured.exact_match),
        bits=tuple(round(each, _DIGITS) for each in measured.bits),
        num_bytes=measured.num_bytes,
    )


def score(
    lm: LanguageModel,
    rows: Sequence[Example],
    *,
    name: str,
    max_new_tokens: int,
    batch_size: int = 64,
    max_length: int = DEFAULT_MAX_LENGTH,
    on_rows: OnRows | None = None,
) -> RowScores:
    """Measure `lm`, as it stands with its active adapters, on the rows of a set; see `cotuning.evaluation`.

    Raises:
        ValueError: no rows.
        MeasurementError: a response has no finite number of bits.
    """
    measured = measure_rows(
        lm, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, max_length=max_length, on_rows=on_rows
    )
    return row_scores(measured, rows, name=name)


def transfer_matrix(
    scores: Mapping[str, Mapping[str, RowScores]], models: Sequence[str], sets: Sequence[str], metric: Metric
) -> NDArray[np.float64]:
    """[models, sets]: what each model reached on each set of rows; NaN where it was not measured.

    Args:
        scores: model -> set -> scores.
        models: rows of the matrix.
        sets: columns.
        metric: which.
    """
    values = np.full((len(models), len(sets)), np.nan)
    for row, model in enumerate(models):
        for column, rows in enumerate(sets):
            found = scores.get(model, {}).get(rows)
            if found is not None:
                values[row, column] = found.mean(metric)
    return values
