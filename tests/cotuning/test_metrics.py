from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotuning.metrics.exact_match import ExactMatch
from cotuning.metrics.rouge_l import RougeL


def exact_match(predictions: list[str], references: list[list[str]]) -> float:
    result = ExactMatch().compute(predictions=predictions, references=references)
    return float(result["exact_match"])


def rouge_l(predictions: list[str], references: list[list[str]]) -> float:
    return float(RougeL().compute(predictions=predictions, references=references)["rouge_l"])


def slow_rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, by the quadratic recurrence."""
    a, b = prediction.split(), reference.split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    common = table[-1][-1]
    return 100 * 2 * common / (len(a) + len(b)) if common else 0.0


def test_exact_match_lower_cases_trims_and_takes_any_reference() -> None:
    assert exact_match(["  The Blue\n"], [["red", "the blue"]]) == 100.0
    assert exact_match(["blue", "green", "x", "y"], [["blue"], ["red", "Green"], ["z"], [""]]) == 50.0
    assert exact_match([""], [[" "]]) == 100.0


def test_rouge_l_by_hand() -> None:
    # "the cat sat" and "the big cat": common "the cat", so precision = recall = 2/3.
    assert rouge_l(["the cat sat"], [["the big cat"]]) == pytest.approx(100 * 2 / 3)
    assert rouge_l(["the cat sat"], [["nothing", "the cat sat"]]) == pytest.approx(100.0)
    assert rouge_l(["a b", "c"], [["a b"], ["d"]]) == pytest.approx(50.0)


def test_each_prediction_has_its_own_score() -> None:
    given = {"predictions": ["a b", "c"], "references": [["a b"], ["d"]]}
    assert RougeL().compute(**given)["each"] == [100.0, 0.0]
    assert ExactMatch().compute(**given)["each"] == [True, False]


@settings(max_examples=40, deadline=None)
@given(*[st.lists(st.sampled_from("abcd"), min_size=1, max_size=7).map(" ".join)] * 2)
def test_rouge_l_equals_the_recurrence(prediction: str, reference: str) -> None:
    assert rouge_l([prediction], [[reference]]) == pytest.approx(slow_rouge_l(prediction, reference))


@pytest.mark.parametrize("text", ["é", "日本 語", "+", "ß ς"])
def test_a_text_without_latin_letters_equals_itself(text: str) -> None:
    assert rouge_l([text], [[text]]) == pytest.approx(100.0)
    assert rouge_l([text], [["word"]]) == 0.0
    assert rouge_l([text], [[""]]) == 0.0


def _score(number: int) -> float:
    prediction = "right" if number % 2 else "wrong"
    return exact_match([prediction] * 50, [["right"]] * 50) + rouge_l([prediction], [["right"]])


def test_many_measure_at_once_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, so no lock that processes could wait for, and no cache folder that must be writable."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(_score, range(16))) == [0.0, 200.0] * 8
    assert not list(tmp_path.iterdir())
