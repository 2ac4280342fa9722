"""Rouge-L: the F-measure of the longest common subsequence of words, the best reference counting.

Google's `rouge_score` (no stemming), which lower-cases and keeps runs of `[a-z0-9]`. A text without any would score 0
even against itself; such a text is cut at white space instead. That changes no score that was not such a 0: the words
of one kind of text never equal words of the other.
"""

from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from cotuning.metrics.in_memory import InMemoryMetric

_CITATION = "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004"
_DESCRIPTION = "Mean F-measure of Rouge-L, the best reference of each prediction, 0-100."


class RougeL(InMemoryMetric):
    """`compute(predictions=[...], references=[[...], ...])`: `rouge_l`, 0..100, and `each`, what it is the mean of."""

    def _info(self) -> Any:
        return self._describe(_DESCRIPTION, _CITATION)

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        scorer = RougeScorer(["rougeL"], tokenizer=_Words())
        scores = [
            100.0 * scorer.score_multi(accepted, answer)["rougeL"].fmeasure
            for answer, accepted in zip(predictions, references, strict=True)
        ]
        return {"rouge_l": sum(scores) / len(scores), "each": scores}


class _Words(Tokenizer):  # type: ignore[misc]
    """The library's words, or what stands between spaces where a text has none of those."""

    def __init__(self) -> None:
        self._default = DefaultTokenizer(use_stemmer=False)

    def tokenize(self, text: str) -> list[str]:
        words: list[str] = self._default.tokenize(text)
        return words or text.lower().split()
