import csv
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from assets.data import examples_to_jsonl, read_examples
from assets.errors import DataFileError
from cotuning.examples import Example, render_prompt
from tests.tiny_models import tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"id": "1", "task": "t", "instruction": "Say it.", "input": "what", "output": "it"},
    {"id": "2", "task": "", "instruction": "Añade\nlíneas", "input": "", "output": "日本"},
]
EXAMPLES = [
    Example("1", "Say it.", "what", "it", "t"),
    Example("2", "Añade\nlíneas", "", "日本", ""),
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_plain_and_gzipped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert read_examples(path) == EXAMPLES
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read_examples(zipped) == EXAMPLES
    assert read_examples(str(path), limit=1) == EXAMPLES[:1]


def test_csv_with_line_breaks_in_cells(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    assert read_examples(path) == EXAMPLES


def test_parquet_and_a_datasets_folder(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert read_examples(tmp_path / "rows.parquet") == EXAMPLES
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "folder"))
    assert read_examples(tmp_path / "folder", limit=1) == EXAMPLES[:1]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataFileError, match=r"expected one split, got a folder of several \(train\)"):
        read_examples(tmp_path / "splits")
    assert read_examples(tmp_path / "splits" / "train") == EXAMPLES


def test_prompt_and_completion(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "2+2?", "completion": 4}])
    (row,) = read_examples(path)
    assert (row.instruction, row.input, row.output) == ("2+2?", "", "4")
    assert len(row.id) == 16


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_chat_messages(tmp_path: Path) -> None:
    rows = [
        chat(("user", "Hi?"), ("assistant", "Ho.")),
        chat(("system", "Be brief."), ("user", "Hi?"), ("assistant", "Ho.")),
        chat(("user", "Hi?"), ("assistant", "Ho."), ("user", "And?"), ("assistant", "So.")),
    ]
    read = [
        (row.instruction, row.input, row.output) for row in read_examples(write_jsonl(tmp_path / "rows.jsonl", rows))
    ]
    assert read == [
        ("Hi?", "", "Ho."),
        ("Be brief.", "Hi?", "Ho."),
        ("user: Hi?\nassistant: Ho.\nuser: And?", "", "So."),
    ]


def test_references_of_the_row_or_of_an_extra_file(tmp_path: Path) -> None:
    own = ROWS[0] | {"references": ["it", "that"]}
    path = write_jsonl(tmp_path / "rows.jsonl", [own, ROWS[1]])
    extra = write_jsonl(
        tmp_path / "extra.jsonl", [{"id": "2", "references": ["日本", "nihon"]}, {"id": "1", "references": ["no"]}]
    )
    first, second = read_examples(path, extra_references=extra)
    assert first.accepted == ("it", "that")
    assert second.accepted == ("日本", "nihon")
    assert read_examples(path)[1].accepted == ("日本",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', r"rows.jsonl:2: expected a JSON object, got '"),
        (b'\n\n["a"]\n', r"rows.jsonl:3: expected a JSON object, got \['a'\]"),
        (b'{"question": "a"}\n', r"rows.jsonl:1: expected columns instruction/input/output, .* got question"),
        (b'{"instruction": "a"}\n', r"rows.jsonl:1: expected a text in column 'output', got columns instruction"),
        (b'{"prompt": "a", "completion": null}\n', r"rows.jsonl:1: expected a text in column 'completion', got null"),
        (b'{"prompt": "a", "completion": " "}\n', r"rows.jsonl:1: expected a text in column 'completion', got ' '"),
        (b'{"prompt": ["a"], "completion": "b"}\n', r"rows.jsonl:1: expected a text in column 'prompt', got \['a'\]"),
        (b'{"prompt": "a", "completion": "\\ud800"}\n', r"rows.jsonl:1: .*'completion', got a lone surrogate"),
        (b'{"prompt": "a", "completion": "b", "references": "b"}\n', r"jsonl:1: expected `references` to be a list"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', r"jsonl:1: .*ends with the assistant's, got roles"),
        (b'{"messages": "hello"}\n', r"rows.jsonl:1: expected `messages` to be a list"),
        (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}', r"jsonl:1: message 1: expected"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n', r"rows.jsonl:2: expected UTF-8, got byte 0xff"),
        (b"[" * 100_000, r"rows.jsonl:1: expected a JSON object"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=message):
        read_examples(path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"none.jsonl: expected a data file .* found nothing there"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataFileError, match=r"expected .jsonl, .* got a file named 'rows.txt'"):
        read_examples(tmp_path / "rows.txt")
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\nc\n")
    with pytest.raises(DataFileError, match=r"rows.csv:3: expected 2 cells, got 1"):
        read_examples(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b,c\n")
    with pytest.raises(DataFileError, match=r"rows.csv:2: expected 2 cells, got 3"):
        read_examples(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text('prompt,completion\n"a,b\n')
    with pytest.raises(DataFileError, match=r"rows.csv:\d: expected a row of CSV"):
        read_examples(tmp_path / "rows.csv")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataFileError, match=r"rows.parquet: expected a Parquet file"):
        read_examples(tmp_path / "rows.parquet")
    whole = gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 1000)
    for broken in (whole[:-12], b"not gzip at all", whole[:30] + b"\xff\xff" + whole[32:]):
        (tmp_path / "rows.jsonl.gz").write_bytes(broken)
        with pytest.raises(DataFileError, match=r"rows.jsonl.gz"):
            read_examples(tmp_path / "rows.jsonl.gz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataFileError, match=r"folder: expected a folder that `datasets` has saved"):
        read_examples(tmp_path / "folder")
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataFileError, match=r"extra.jsonl:1: expected `id` and a non-empty list"):
        read_examples(path, extra_references=write_jsonl(tmp_path / "extra.jsonl", [{"id": "1"}]))


def test_rows_after_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nbroken\n")
    assert read_examples(path, limit=1) == EXAMPLES[:1]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n\n")
    assert read_examples(tmp_path / "rows.jsonl") == []


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(st.builds(Example, texts, texts, texts, texts, texts, st.lists(texts, max_size=2).map(tuple))))
def test_what_is_written_is_read_back(rows: list[Example]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(examples_to_jsonl(rows))
        assert read_examples(path) == rows
    assert examples_to_jsonl(rows) == examples_to_jsonl(list(rows))


def test_prompts_plain_and_by_the_tokenizers_own_template() -> None:
    tokenizer = tiny_tokenizer("byte_bpe")
    assert render_prompt(tokenizer, EXAMPLES[0]) == "Instruction: Say it.\nInput: what\nOutput:\n"
    assert render_prompt(tokenizer, EXAMPLES[1]) == "Instruction: Añade\nlíneas\nOutput:\n"
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert render_prompt(tokenizer, EXAMPLES[0]) == "<user>Say it.\nwhat</><assistant>"
