import math

import numpy as np
import pytest
from pydantic import ValidationError

from cotuning.evaluation import RowMeasurements, evaluate
from cotuning.examples import Example
from simulation.errors import MeasurementError
from simulation.scores import RowScores, row_scores, score, sign, transfer_matrix
from tests.simulation.observations import scores_of
from tests.tiny_models import tiny_examples, tiny_language_model

ROWS = [Example("a", "Say it.", "", "one"), Example("b", "Say it.", "", "four")]
MEASURED = RowMeasurements((100.0, 33.333333), (True, False), (6.0, 30.0), (3, 6))


def test_the_metrics_are_those_of_the_rows_together() -> None:
    found = row_scores(MEASURED, ROWS, name="test")
    assert found.exact_match == (1, 0)
    assert found.mean("exact_match") == 50.0
    assert found.mean("rouge_l") == pytest.approx((100 + 33.3333) / 2)
    assert found.mean("bits_per_byte") == 36 / 9  # not the mean of 2 and 5
    assert [sign(each) for each in ("rouge_l", "exact_match", "bits_per_byte")] == [1, 1, -1]


def test_other_rows_or_references_have_another_digest() -> None:
    found = row_scores(MEASURED, ROWS, name="test")
    assert row_scores(MEASURED, list(ROWS), name="other").digest == found.digest
    others = [ROWS[0], Example("b", "Say it.", "", "four", references=("four", "4"))]
    assert row_scores(MEASURED, others, name="test").digest != found.digest


def test_json_gives_back_the_same() -> None:
    found = row_scores(MEASURED, ROWS, name="test")
    assert RowScores.model_validate_json(found.model_dump_json()) == found


def test_a_model_that_diverged_is_told_by_row() -> None:
    broken = RowMeasurements((1.0, 1.0), (True, False), (6.0, math.nan), (3, 6))
    with pytest.raises(MeasurementError, match="finite bits for each row of test, got others for b"):
        row_scores(broken, ROWS, name="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": [1.0]}, "as many values of each kind"),
        ({"rouge_l": [101.0, 0.0]}, "Rouge-L from 0 to 100"),
        ({"exact_match": [2, 0]}, "exact_match"),
        ({"bits": [-1.0, 1.0]}, "bits and bytes of at least 0"),
        ({"num_bytes": [0, 0]}, "0 bytes in all"),
        ({"bits": [math.inf, 1.0]}, "finite"),
        ({"surplus": 1}, "surplus"),
    ],
    ids=["lengths", "rouge_l", "exact_match", "negative", "no_bytes", "infinite", "surplus"],
)
def test_what_is_no_measurement_is_refused(change: dict, message: str) -> None:
    values = row_scores(MEASURED, ROWS, name="test").model_dump()
    with pytest.raises(ValidationError, match=message):
        RowScores.model_validate(values | change)


def test_a_model_is_scored_as_evaluation_scores_it() -> None:
    lm, rows = tiny_language_model("gpt2"), tiny_examples(5)
    found = score(lm, rows, name="test", max_new_tokens=4, batch_size=2)
    whole = evaluate(lm, rows, max_new_tokens=4, batch_size=2)
    assert found.num_rows == 5
    assert found.mean("rouge_l") == pytest.approx(whole.rouge_l, abs=1e-3)
    assert found.mean("exact_match") == whole.exact_match
    assert found.mean("bits_per_byte") == pytest.approx(whole.bits_per_byte, abs=1e-4)
    alone = [score(lm, [row], name="test", max_new_tokens=4) for row in rows]
    assert [each.bits[0] for each in alone] == pytest.approx(found.bits, abs=2e-3)
    assert [each.num_bytes[0] for each in alone] == [len(row.output.encode()) for row in rows]


def test_transfer_has_the_devices_in_rows_and_the_sets_in_columns() -> None:
    scores = {
        "phone": {"web": scores_of([10, 30], "web"), "units": scores_of([50], "units")},
        "laptop": {"units": scores_of([90], "units")},
    }
    found = transfer_matrix(scores, ["laptop", "phone"], ["web", "units"], "rouge_l")
    np.testing.assert_array_equal(found, [[math.nan, 90.0], [20.0, 50.0]])
