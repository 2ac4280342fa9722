"""Exact match: the share of answers that equal one of their references, lower-cased and trimmed."""

from typing import Any

from cotuning.metrics.in_memory import InMemoryMetric

_DESCRIPTION = "Share of predictions equal to one of their references after lower-casing and trimming, 0-100."


class ExactMatch(InMemoryMetric):
    """`compute(predictions=[...], references=[[...], ...])`: `exact_match`, 0..100, and `each`, whether one matched."""

    def _info(self) -> Any:
        return self._describe(_DESCRIPTION, "")

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        pairs = zip(predictions, references, strict=True)
        matches = [normalise(answer) in {normalise(each) for each in accepted} for answer, accepted in pairs]
        return {"exact_match": 100.0 * sum(matches) / len(matches), "each": matches}


def normalise(text: str) -> str:
    """Lower-cased and trimmed."""
    return text.lower().strip()
