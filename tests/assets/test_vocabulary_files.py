"""Tokenizers that travel: read elsewhere as at home, and nothing in the file is run or trusted."""

import copy
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from assets import vocabulary_files
from assets.errors import VocabularyError
from assets.tensors import read_tensors, tensors_to_bytes
from assets.vocabulary_files import read_vocabulary, vocabulary_file
from cotuning.examples import Example, render_prompt
from cotuning.probe_logits import probe_places
from cotuning.vocabulary import Reads, Vocabulary
from tests.cotuning.trained_tokenizers import KINDS, SENTENCES, trained
from tests.tiny_models import tiny_examples, tiny_language_model

ROWS = [*tiny_examples(3), *(Example(str(number), text, "", text) for number, text in enumerate(SENTENCES))]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>\\n' }}{{ m['content'] CUT }}<|end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<assistant>\n"}}{% raw %}{%{% endraw %}\\é😀{% endif %}'
)


def travelled(reads: Reads, folder: Path) -> Vocabulary:
    path = folder / "vocabulary"
    path.write_bytes(vocabulary_file(reads))
    return read_vocabulary(path)


def with_template(template: str) -> Vocabulary:
    tokenizer = copy.deepcopy(trained("byte_level"))
    tokenizer.chat_template = template
    return Vocabulary.of(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_the_same_elsewhere(kind: str, tmp_path: Path) -> None:
    home = Vocabulary.of(trained(kind, 1))
    home.tokenizer(["a", "b c"], truncation=True, max_length=1)  # leaves a trace in the tokenizer
    there = travelled(home, tmp_path)
    ours, theirs = (probe_places(reads, ROWS, max_length=64) for reads in (home, there))
    assert torch.equal(ours.target_S, theirs.target_S)
    assert torch.equal(ours.byte_start_S, theirs.byte_start_S)
    assert (there.table.pieces, there.table.end_id) == (home.table.pieces, home.table.end_id)
    assert vocabulary_file(there) == vocabulary_file(home)


@pytest.mark.parametrize("cut", ["", "| trim"])
def test_what_a_chat_template_writes_travels_and_the_template_does_not(cut: str, tmp_path: Path) -> None:
    home = with_template(TEMPLATE.replace("CUT", cut))
    there = travelled(home, tmp_path)
    for row in [*ROWS, Example("loose", "  spaces around\n", "", "x")]:
        assert render_prompt(there.tokenizer, row) == render_prompt(home.tokenizer, row)
    assert there.table.end_id == home.table.end_id
    assert b"endraw" not in vocabulary_file(home)
    assert b"m['role']" not in vocabulary_file(home)


def test_what_cannot_travel_is_refused_at_home() -> None:
    loud = with_template("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(VocabularyError, match="a chat template that writes a question as it is"):
        vocabulary_file(loud)
    long = with_template("{% for m in messages %}{{ 'x' * 20000 }}{{ m['content'] }}{% endfor %}")
    with pytest.raises(VocabularyError, match="a chat template that writes less"):
        vocabulary_file(long)

    class Slow:
        tokenizer = object()

    with pytest.raises(VocabularyError, match="expected a tokenizer of the `tokenizers` library, got object"):
        vocabulary_file(Slow())  # type: ignore[arg-type]


def packed(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(text.encode())), dtype=torch.uint8)


def huge_id(text: str) -> str:
    values = json.loads(text)
    values["model"]["vocab"]["far"] = 2**31
    return json.dumps(values)


def with_component(text: str, **components: Any) -> str:
    return json.dumps(json.loads(text) | components)


def with_special(name: str, value: str) -> Any:
    def changed(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        about = json.loads(metadata["about"])
        about["special_tokens"][name] = value
        metadata["about"] = json.dumps(about)

    return changed


def with_dropout(text: str) -> str:
    values = json.loads(text)
    values["model"] = {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}
    return json.dumps(values)


def with_text(change: Callable[[str], str]) -> Any:
    def changed(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors["tokenizer"] = packed(change(zlib.decompress(tensors["tokenizer"].numpy().tobytes()).decode()))

    return changed


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda tensors, metadata: metadata.update(format="cotune-vocabulary/9"), "expected cotune-vocabulary/1"),
        (lambda tensors, metadata: metadata.update(fingerprint="0" * 64), "expected a tokenizer with the fingerprint"),
        (lambda tensors, metadata: metadata.update(about="{}"), "3 wrong fields"),
        (lambda tensors, metadata: tensors.update(more=torch.zeros(1)), "and nothing else"),
        (lambda tensors, metadata: tensors.update(tokenizer=torch.zeros(9, dtype=torch.uint8)), "compressed JSON"),
        (with_text(lambda text: "{}"), "expected the JSON of a tokenizer"),
        (with_text(lambda text: " " * 2**20 + text), "unpacks to at most 524288 bytes, got more"),
        (with_text(huge_id), "the greatest is 2147483648"),
        (with_text(with_dropout), "always reads a text the same, got a dropout of 0.5"),
        (
            with_text(lambda text: with_component(text, pre_tokenizer={"type": "FixedLength", "length": 0})),
            "expected a tokenizer that reads a text: chunk size",  # a panic
        ),
        (with_special("chat_template", "{% for n in range(9) %}{{ n }}{% endfor %}"), "1 wrong fields"),
        (with_special("tokenizer_object", "x"), "1 wrong fields"),
    ],
)
def test_what_is_no_honest_file_is_refused(
    spoil: Callable[[dict[str, torch.Tensor], dict[str, str]], None],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "vocabulary"
    path.write_bytes(vocabulary_file(tiny_language_model("gpt2")))
    tensors, metadata = read_tensors(path)
    spoil(tensors, metadata)
    path.write_bytes(tensors_to_bytes(tensors, metadata))
    monkeypatch.setattr(vocabulary_files, "MOST_TEXT_BYTES", 2**19)
    with pytest.raises(VocabularyError, match=told):
        read_vocabulary(path)
