"""Rows of data from the files that people have: JSONL (also gzipped), CSV, Parquet, or a `datasets` folder.

Three kinds of columns are understood: `instruction`, `input`, `output`; `prompt`, `completion`; `messages` (a chat, of
which the last assistant message is the answer). `id`, `task` and `references` may come with any of them.

Errors name the file and the line (the row, where there are no lines), what was expected and what came.
"""

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from assets.errors import DataFileError
from cotuning.examples import Example

_COLUMNS = "instruction/input/output, prompt/completion or messages"
_FORMATS = ".jsonl, .jsonl.gz, .csv, .parquet, or a folder that `datasets` has saved"
_SHOWN_CHARACTERS = 80
EXTRA_REFERENCES_FILE = "extra_references.jsonl"

Row = tuple[str, Mapping[str, Any]]
"""Where a row is (`path:line`), and its columns."""


def read_examples(path: Path | str, *, limit: int | None = None, extra_references: Path | None = None) -> list[Example]:
    """Read all rows, or the first `limit`.

    Args:
        path: a file or a `datasets` folder.
        limit: stop after so many rows; what follows is not looked at.
        extra_references: JSONL of `{id, references}`: more accepted answers, for rows that name none themselves.

    Raises:
        DataFileError: a file that is missing or of unknown kind, a broken line, a column missing or of a wrong type.
    """
    path = Path(path)
    rows = islice(_rows(path), limit)
    references = _read_references(extra_references) if extra_references is not None else {}
    return [_example(place, row, number, references) for number, (place, row) in enumerate(rows)]


def examples_to_jsonl(rows: Iterable[Example]) -> bytes:
    """The rows as `read_examples` reads them, one JSON object a line, UTF-8; equal rows give equal bytes."""
    lines: list[str] = []
    for row in rows:
        values: dict[str, Any] = {
            "id": row.id,
            "task": row.task,
            "instruction": row.instruction,
            "input": row.input,
            "output": row.output,
        }
        if row.references:
            values["references"] = list(row.references)
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def examples_from_jsonl(content: bytes) -> list[Example]:
    """The rows that `examples_to_jsonl` wrote.

    Raises:
        DataFileError: as `read_examples`; it names the line.
    """
    rows: list[Example] = []
    for number, line in enumerate(content.splitlines(), 1):
        place = f"line {number}"
        try:
            row = _json_row(place, line.decode())
        except UnicodeDecodeError as error:
            raise DataFileError(f"{place}: expected UTF-8, got byte 0x{error.object[error.start]:02x}") from None
        rows.append(_example(place, row, number - 1, {}))
    return rows


def _rows(path: Path) -> Iterator[Row]:
    if path.is_dir():
        return _dataset_rows(path)
    if not path.is_file():
        raise DataFileError(f"{path}: expected a data file ({_FORMATS}), found nothing there")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_rows(path)
    if path.suffix == ".csv":
        return _csv_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise DataFileError(f"{path}: expected {_FORMATS}, got a file named {path.name!r}")


def _json_rows(path: Path) -> Iterator[Row]:
    for place, line in _lines(path):
        if line.strip():
            yield place, _json_row(place, line)


def _json_row(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataFileError(f"{place}: expected a JSON object, got {_shorten(line)}: {error}") from None
    except RecursionError:
        raise DataFileError(f"{place}: expected a JSON object, got one too deeply nested") from None
    if not isinstance(row, dict):
        raise DataFileError(f"{place}: expected a JSON object, got {_shorten(row)}")
    return row


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines as text, each with its place. Decoded one by one, so that a broken one can be named."""
    place = f"{path}:1"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                place = f"{path}:{number}"
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataFileError(f"{place}: expected UTF-8, got byte 0x{error.object[error.start]:02x}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataFileError(f"{path}: expected a whole gzip file, after {place}: {error}") from None
    except OSError as error:
        raise DataFileError(f"{path}: expected a readable file: {error}") from None


def _csv_rows(path: Path) -> Iterator[Row]:
    text = (line for _, line in _lines(path))
    reader = csv.DictReader(text, strict=True)
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                cells = sum(value is not None for key, value in row.items() if key is not None)
                cells += len(row.get(None) or [])
                raise DataFileError(f"{place}: expected {len(reader.fieldnames or [])} cells, got {cells}")
            yield place, row
    except csv.Error as error:
        raise DataFileError(f"{path}:{reader.line_num}: expected a row of CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (ArrowException, OSError) as error:
        raise DataFileError(f"{path}: expected a Parquet file: {error}") from None


def _dataset_rows(path: Path) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataFileError(f"{path}: expected a folder that `datasets` has saved: {error}") from None
    if isinstance(data, datasets.DatasetDict):
        splits = ", ".join(data)
        raise DataFileError(f"{path}: expected one split, got a folder of several ({splits}); name one: {path}/<split>")
    for number, row in enumerate(data, 1):
        yield f"{path}: row {number}", row


def _example(place: str, row: Mapping[str, Any], number: int, references: Mapping[str, tuple[str, ...]]) -> Example:
    if "instruction" in row or "output" in row:
        instruction, given = _text(place, row, "instruction"), _text(place, row, "input", required=False)
        output = _text(place, row, "output")
    elif "prompt" in row or "completion" in row:
        instruction, given = _text(place, row, "prompt"), ""
        output = _text(place, row, "completion")
    elif "messages" in row:
        instruction, given, output = _chat(place, row["messages"])
    else:
        raise DataFileError(f"{place}: expected columns {_COLUMNS}; got {', '.join(map(str, row)) or 'none'}")
    name = _text(place, row, "id", required=False) or _digest(instruction, given, output, number)
    own = _references(place, row.get("references"))
    task = _text(place, row, "task", required=False)
    return Example(name, instruction, given, output, task, own or references.get(name, ()))


def _text(place: str, row: Mapping[str, Any], column: str, *, required: bool = True) -> str:
    """A column as text. Numbers are taken as they are written; an optional column may be absent or null."""
    value = row.get(column)
    if value is None:
        if not required:
            return ""
        found = "null" if column in row else f"columns {', '.join(map(str, row))}"
        raise DataFileError(f"{place}: expected a text in column {column!r}, got {found}")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataFileError(f"{place}: expected a text in column {column!r}, got {_shorten(value)}")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataFileError(f"{place}: expected Unicode text in column {column!r}, got a lone surrogate")
    if required and column != "input" and not text.strip():
        raise DataFileError(f"{place}: expected a text in column {column!r}, got {_shorten(text)}")
    return text


def _chat(place: str, messages: Any) -> tuple[str, str, str]:
    """The last assistant message is the answer; what comes before it is the question."""
    expected = "expected `messages` to be a list of {role, content} that ends with the assistant's"
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise DataFileError(f"{place}: {expected}, got {_shorten(messages)}")
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        roles = [each.get("role") for each in messages]
        raise DataFileError(f"{place}: {expected}, got roles {_shorten(roles)}")
    contents = [_text(f"{place}: message {number}", each, "content") for number, each in enumerate(messages, 1)]
    before = messages[:-1]
    if len(before) == 1:
        return contents[0], "", contents[-1]
    if len(before) == 2 and before[0].get("role") == "system":
        return contents[0], contents[1], contents[-1]
    turns = [f"{each.get('role')}: {content}" for each, content in zip(before, contents, strict=False)]
    return "\n".join(turns), "", contents[-1]


def _references(place: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise DataFileError(f"{place}: expected `references` to be a list of texts, got {_shorten(value)}")
    return tuple(value)


def _read_references(path: Path) -> dict[str, tuple[str, ...]]:
    if not path.is_file():
        raise DataFileError(f"{path}: expected a JSONL file of {{id, references}}, found nothing there")
    found: dict[str, tuple[str, ...]] = {}
    for place, row in _json_rows(path):
        references = _references(place, row.get("references"))
        if not references:
            raise DataFileError(f"{place}: expected `id` and a non-empty list `references`, got {_shorten(row)}")
        found[_text(place, row, "id")] = references
    return found


def _digest(instruction: str, given: str, output: str, number: int) -> str:
    """An id for a row that has none: its texts and its place in the file."""
    text = json.dumps([number, instruction, given, output])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
