"""A model is described from its files, without torch."""

import json
import struct
from pathlib import Path

import pytest

from edge_agent.profile import describe_model, tokenizer_kind


def write_weights(path: Path, shapes: dict[str, list[int]]) -> None:
    header: dict[str, object] = {}
    position = 0
    for name, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(position))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-gpt2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "tokenizer.json").write_text(
        '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "pre_tokenizer": {"type": "ByteLevel"},'
        ' "added_tokens": [{"id": 1, "content": "b"}, {"id": 2, "content": "<end>"}]}'
    )
    write_weights(folder / "model-00001-of-00002.safetensors", {"x": [3, 4], "y": []})
    write_weights(folder / "model-00002-of-00002.safetensors", {"z": [5]})
    return folder


def test_a_folder_is_described_from_its_headers(folder: Path) -> None:
    problems: list[str] = []
    description = describe_model(str(folder), problems)
    assert problems == []
    assert description is not None
    assert description.name == "tiny-gpt2"
    assert description.architecture == "gpt2"
    assert description.parameters == 12 + 1 + 5
    assert description.tokenizer_kind == "byte-level BPE, 3 tokens"


def test_a_folder_without_its_files_is_a_problem_that_names_them(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    problems: list[str] = []
    assert describe_model(str(folder), problems) is None
    (problem,) = problems
    assert "config.json with model_type, *.safetensors" in problem
    assert "tokenizer.json" not in problem


def test_broken_weights_are_a_problem(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"\xff" * 20)
    problems: list[str] = []
    assert describe_model(str(folder), problems) is None
    assert "header says" in problems[0]


def test_a_path_that_is_no_folder_and_no_hub_name_is_a_problem() -> None:
    problems: list[str] = []
    assert describe_model("/no/such/folder", problems) is None
    assert "'/no/such/folder'" in problems[0]


def test_tokenizer_kinds() -> None:
    unigram = {"model": {"type": "Unigram", "vocab": [["a", 0], ["b", 0]]}, "decoder": {"type": "Metaspace"}}
    assert tokenizer_kind(unigram) == "metaspace Unigram, 2 tokens"
    assert tokenizer_kind({"model": {"type": "WordPiece", "vocab": {"a": 0}}}) == "WordPiece, 1 tokens"
