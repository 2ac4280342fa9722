"""A client reads what a server says that is newer than itself: unknown words as text, unknown fields not at all."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from protocol.base import RequestModel, reading_answers
from protocol.errors import ErrorCode
from protocol.health import Readiness
from protocol.runs import Round, RoundMetrics, Run, RunCreate
from protocol.statuses import PartKind, RunStatus
from tests.contracts.newer_server import FIELD, WORD, newer
from tests.contracts.test_messages import RECORDED, load

ANSWERS = [path for path in RECORDED if not issubclass(load(path)[0], RequestModel)]


@pytest.mark.parametrize("path", ANSWERS, ids=lambda path: path.stem)
def test_every_recorded_answer_as_a_newer_server_would_say_it(path: Path) -> None:
    schema, message = load(path)
    told = newer(schema.model_validate(message), message)
    text = json.dumps(told)
    assert FIELD in text
    with reading_answers():
        read = schema.model_validate_json(text)
    shown = read.model_dump_json(by_alias=True)
    assert shown.count(f'"{WORD}"') == text.count(f'"{WORD}"'), "each unknown word is kept"
    assert FIELD not in shown
    if WORD in text:  # A server that is told such a thing, or says it, is wrong.
        with pytest.raises(ValidationError):
            schema.model_validate_json(text)


def test_an_unknown_word_is_none_of_the_known_ones_and_shown_as_it_came() -> None:
    with reading_answers():
        metrics = RoundMetrics.model_validate({"rejected": {"dev_1": WORD, "dev_2": "norm_outlier"}})
    code = metrics.rejected["dev_1"]
    assert isinstance(code, ErrorCode)
    assert (code, code.value, str(code), f"{code:>18}") == (WORD, WORD, WORD, f"{WORD:>18}")
    assert code not in set(ErrorCode)
    assert metrics.rejected["dev_2"] is ErrorCode.NORM_OUTLIER
    assert RoundMetrics(**metrics.model_dump()) == metrics
    assert WORD not in ErrorCode.__members__


def test_the_block_ends_also_with_an_error() -> None:
    with pytest.raises(ValidationError), reading_answers():
        Round.model_validate({})
    for word in (RunStatus, PartKind, ErrorCode):
        with pytest.raises(ValueError, match=WORD):
            word(WORD)


def test_what_a_server_is_asked_for_has_known_words_and_fields_only() -> None:
    asked = {"name": "a", "strategy": {"name": "standalone"}, "rounds": 1}
    for wrong in (asked | {FIELD: 1}, asked | {"late_updates": WORD}):
        with pytest.raises(ValidationError):
            RunCreate.model_validate(wrong)
        with reading_answers(), pytest.raises(ValidationError):
            RunCreate.model_validate(wrong)
    with pytest.raises(ValidationError):
        Readiness.model_validate({"status": WORD, "checks": {}})


def test_a_run_with_settings_of_tomorrow_is_read_by_what_is_known() -> None:
    path = next(each for each in RECORDED if each.stem == "run")
    _, message = load(path)
    known = Run.model_validate(message)
    config = message["config"]
    added = config | {FIELD: 1, "strategy": config["strategy"] | {FIELD: {"x": 1}}}
    with reading_answers():
        assert Run.model_validate_json(json.dumps(message | {"config": added})) == known
