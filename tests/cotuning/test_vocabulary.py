from dataclasses import fields

import pytest
import torch

from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import EncodedBatch
from cotuning.probe_logits import probe_places
from cotuning.vocabulary import Vocabulary
from tests.tiny_models import tiny_examples, tiny_language_model

ROWS = tiny_examples(5)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_rows_are_read_by_a_tokenizer_alone_as_with_its_model(name: str) -> None:
    lm = tiny_language_model(name)
    vocabulary = Vocabulary.of(lm.tokenizer)
    assert vocabulary.table.fingerprint == lm.table.fingerprint
    assert vocabulary.device == torch.device("cpu")
    mine, theirs = (EncodedRows(reads, ROWS, max_length=64).batch(range(5)) for reads in (vocabulary, lm))
    for field in fields(EncodedBatch):
        assert torch.equal(getattr(mine, field.name), getattr(theirs, field.name))
    places = [probe_places(reads, ROWS, max_length=64) for reads in (vocabulary, lm)]
    assert torch.equal(places[0].target_S, places[1].target_S)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny_language_model("gpt2").tokenizer
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end"):
        Vocabulary.of(tokenizer)
