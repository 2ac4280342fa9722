"""What a run may be asked to be, as far as its fields tell."""

import pytest
from pydantic import ValidationError

from protocol.runs import RunCreate
from protocol.strategies import FedLoraSettings


def test_rows_to_test_on_need_public_rows() -> None:
    given = {"name": "x", "rounds": 1, "slm": "/models/slm", "strategy": FedLoraSettings()}
    assert RunCreate(**given).evaluation_data is None
    assert RunCreate(**given, public_data="/public.jsonl", evaluation_data="/test.jsonl").public_data is not None
    with pytest.raises(ValidationError, match="`evaluation_data` needs `public_data`, got none"):
        RunCreate(**given, evaluation_data="/test.jsonl")
