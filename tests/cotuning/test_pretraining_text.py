import random
from collections import Counter
from itertools import islice

import pytest
import torch

from cotuning.pretraining_text import PADDING, PROMPT, TEXT, TrainingText, Windows, token_stream
from cotuning.tokenizer_training import train_tokenizer

DOCUMENTS = [f"Document {number} says that {number} and {number} are {2 * number}." for number in range(30)]
ROWS = [
    TrainingText(f"Instruction: Say it.\nInput: {number}\nOutput:\n", "yes " * (number % 5 + 1)) for number in range(25)
]
TOKENIZER = train_tokenizer("bpe_single_digits", DOCUMENTS, vocab_size=400, max_length=64)
END = TOKENIZER.eos_token_id


def test_document_windows_are_the_stream_of_all_documents_with_their_ends():
    windows = Windows.of_documents(TOKENIZER, DOCUMENTS, length=16)
    stream = token_stream(TOKENIZER, DOCUMENTS)
    assert int((stream == END).sum()) == len(DOCUMENTS)
    assert torch.equal(windows.ids_WT.flatten(), stream[: len(windows) * 16])
    assert len(stream) - len(windows) * 16 < 16
    assert set(windows.parts_WT.flatten().tolist()) == {TEXT}


def test_a_text_shorter_than_a_window_is_one_padded_window():
    windows = Windows.of_documents(TOKENIZER, ["One."], length=64)
    assert len(windows) == 1
    assert TOKENIZER.decode(windows.ids_WT[0][windows.parts_WT[0] != PADDING]) == "One.<|end|>"


def test_row_windows_hold_every_row_once_whole_with_its_prompt_marked():
    length = 60
    windows = Windows.of_rows(TOKENIZER, ROWS, length=length)
    found = Counter()
    for ids, parts in zip(windows.ids_WT.tolist(), windows.parts_WT.tolist(), strict=True):
        read = [each for each, part in zip(ids, parts, strict=True) if part != PADDING]
        found.update(TOKENIZER.decode(read).split("<|end|>")[:-1])
    assert found == Counter(row.prompt + row.text for row in ROWS)
    responses = [
        TOKENIZER.decode(ids[parts == TEXT]) for ids, parts in zip(windows.ids_WT, windows.parts_WT, strict=True)
    ]
    assert Counter("".join(responses).split("<|end|>")[:-1]) == Counter(row.text for row in ROWS)
    assert set(windows.parts_WT.flatten().tolist()) <= {PADDING, PROMPT, TEXT}


def test_row_windows_waste_little():
    rows = [TrainingText("Say it:\n", "yes " * (number % 40)) for number in range(200)]
    windows = Windows.of_rows(TOKENIZER, rows, length=128)
    assert float((windows.parts_WT != PADDING).float().mean()) > 0.9


def test_a_row_longer_than_a_window_loses_its_end():
    row = TrainingText("Instruction: Count.\nOutput:\n", "word " * 100)
    windows = Windows.of_rows(TOKENIZER, [row], length=16)
    assert windows.ids_WT.tolist() == [TOKENIZER(row.prompt + row.text)["input_ids"][:16]]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_an_epoch_reads_every_window_once_with_the_weights_asked_for(batch_size):
    windows = Windows.of_rows(TOKENIZER, ROWS, length=60)
    num_batches = -(-len(windows) // batch_size)
    batches = list(islice(windows.batches(batch_size, 0.25, random.Random(0)), num_batches))
    read = torch.cat([batch.ids_BT for batch in batches])
    assert sorted(map(tuple, read.tolist())) == sorted(map(tuple, windows.ids_WT.tolist()))
    assert sum(batch.num_tokens for batch in batches) == int((windows.parts_WT != PADDING).sum())
    assert {weight for batch in batches for weight in batch.weights_BT.flatten().tolist()} <= {0.0, 0.25, 1.0}
    again = next(windows.batches(batch_size, 0.25, random.Random(0)))
    assert torch.equal(again.ids_BT, batches[0].ids_BT)
