"""Measurements made up for the tests of what is computed from them."""

import hashlib
from collections.abc import Sequence

import numpy as np

from simulation.run_results import Cell, Observations
from simulation.scores import RowScores


def scores_of(values: Sequence[float], rows: str = "test", *, num_bytes: int = 10) -> RowScores:
    """Rows with these Rouge-L scores; those above 50 match exactly, and bits per byte fall with the score."""
    return RowScores(
        rows=rows,
        digest=hashlib.sha256(f"{rows} {len(values)}".encode()).hexdigest(),
        rouge_l=tuple(values),
        exact_match=tuple(1 if each > 50 else 0 for each in values),
        bits=tuple(num_bytes * (2 - each / 100) for each in values),
        num_bytes=(num_bytes,) * len(values),
    )


def observed(values: np.ndarray, units: Sequence[str] = ("phone",), *, checkpoints: int = 1) -> Observations:
    """Rouge-L of [units, checkpoints * seeds, rows]."""
    return {
        Cell(checkpoint=str(place % checkpoints), seed=place // checkpoints, unit=unit): scores_of(
            values[index, place].tolist(), rows=unit
        )
        for index, unit in enumerate(units)
        for place in range(values.shape[1])
    }
