"""A size of the benchmark of quality with a few rows and models of a few thousand parameters."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from assets.data_folders import PUBLIC_FILE
from command_line.live_view import PlainView, View
from tests.command_line.test_pretrain import DOCUMENTS
from tests.simulation.tiny_world import build

HERE = Path(__file__).parent


def made_data(folder: Path) -> Path:
    """A data folder: two domains with tasks, public rows of both, and a corpus."""
    data = build(folder).data
    public = data / PUBLIC_FILE
    rows = [*_rows(public), *_rows(data / "colour" / "train.jsonl")]
    for number, row in enumerate(rows):
        # Public colours are other rows than the devices' own.
        row |= {"id": f"p{number}", "output": row["output"].replace("the ", "a ")}
    _write(public, rows)
    for path in data.rglob("*.jsonl"):
        found = _rows(path)
        _write(path, [row | {"task": "sums" if row["instruction"].startswith("Add") else "colours"} for row in found])
    (data / "corpus.txt").write_text("\n\n".join(DOCUMENTS))
    return data


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def preset_file(folder: Path, **changes: str) -> str:
    """A file of the miniature in `folder`, beside its recipe; parts of its text replaced by others."""
    text = (HERE / "miniature_quality.toml").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "recipe.toml").write_text((HERE / "miniature_models.toml").read_text())
    path = folder / "miniature.toml"
    path.write_text(text)
    return str(path)


@contextmanager
def quiet() -> Iterator[tuple[View, list[str]]]:
    """A view that prints nothing, and what it was told."""
    said: list[str] = []

    class Heard(PlainView):
        def _line(self, text: str) -> None:
            said.append(text)

    with Heard(Console(quiet=True)) as shown:
        yield shown, said
