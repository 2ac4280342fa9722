"""The data folder that a size of the benchmark of quality is played on: the one that was given, narrowed to some tasks
where the size names them, or the domains that the project makes for itself.
"""

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from assets.corpora import read_documents, write_documents
from assets.data import EXTRA_REFERENCES_FILE, read_examples
from assets.data_folders import LARGE_POOL_FILE, PUBLIC_FILE, SPLITS, domains_of
from assets.errors import DataFileError
from benchmarks.quality_base_models import documents_of
from benchmarks.quality_settings import Preset
from command_line.demo_data import generated_data
from command_line.errors import BadInput


@contextmanager
def data_of(preset: Preset, given: Path | None) -> Iterator[Path]:
    """The data folder of a preset; one that is made for it is gone after the `with`.

    Raises:
        BadInput: a folder was given to a preset that makes its own, or none to another; or it lacks a task.
    """
    if preset.size.generated is (given is not None):
        wanted = "no data folder: this preset makes its data" if preset.size.generated else "a data folder"
        raise BadInput(f"{preset.name}: expected {wanted}; got {given or 'none'}")
    if given is not None and not preset.size.tasks:
        yield given
        return
    with TemporaryDirectory(prefix="cotune-quality-") as made:
        if given is None:
            yield generated_data(Path(made)).folder
        else:
            _narrow(given, preset, Path(made))
            yield Path(made)


def _narrow(given: Path, preset: Preset, made: Path) -> None:
    """Write a folder in which each task is a domain, and public rows and the large pool are of these tasks alone."""
    names = preset.size.tasks
    found: dict[tuple[str, str], list[str]] = {}
    for domain in domains_of(given):
        for split in SPLITS:
            for task, lines in _by_task(given / domain / f"{split}.jsonl", names).items():
                found.setdefault((task, split), []).extend(lines)
    if missing := [f"{task}: {split}" for task in names for split in SPLITS if (task, split) not in found]:
        raise BadInput(
            f"{given}: expected rows of every task that {preset.name} names; got none of {', '.join(missing)}"
        )
    for (task, split), lines in found.items():
        (made / task).mkdir(exist_ok=True)
        (made / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    pools = {
        name: [line for kept in _by_task(given / name, names).values() for line in kept]
        for name in (PUBLIC_FILE, LARGE_POOL_FILE)
        if (given / name).is_file()
    }
    if preset.size.public_pool:
        if LARGE_POOL_FILE not in pools:
            raise BadInput(f"expected the large pool of public rows at {given / LARGE_POOL_FILE}, found no file")
        pools[PUBLIC_FILE] = pools.get(PUBLIC_FILE, []) + pools[LARGE_POOL_FILE]
    for name, lines in pools.items():
        content = "".join(lines).encode()
        (made / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    if (given / EXTRA_REFERENCES_FILE).is_file():
        os.symlink((given / EXTRA_REFERENCES_FILE).resolve(), made / EXTRA_REFERENCES_FILE)
    if (given / preset.size.corpus).is_file():
        _narrow_corpus(given, preset.size.corpus, names, made)


def _narrow_corpus(given: Path, corpus: str, names: Sequence[str], made: Path) -> None:
    """Write the documents that are told to be of these tasks; base models of few tasks need not read of others."""
    try:
        documents = read_documents(given / corpus)
        rows = [row for name in names for split in SPLITS for row in read_examples(made / name / f"{split}.jsonl")]
        others = [row for name in domains_of(given) for row in read_examples(given / name / "train.jsonl")]
    except DataFileError as error:
        raise BadInput(str(error)) from None
    if not (kept := documents_of(documents, rows, others)):
        raise BadInput(f"{given / corpus}: expected documents of {', '.join(names)}; none is told to be of one")
    write_documents(made / corpus, [documents[place] for place in kept])


def _by_task(path: Path, names: Sequence[str]) -> Mapping[str, list[str]]:
    """Lines of rows of these tasks, in the file's order, by task.

    Raises:
        BadInput: the file cannot be read, or a line is no JSON object; names the line.
    """
    found: dict[str, list[str]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row: Any = json.loads(line)
                if not isinstance(row, dict):
                    raise BadInput(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}")
                if row.get("task") in names:
                    found.setdefault(row["task"], []).append(line.rstrip("\n") + "\n")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: expected rows as JSON lines, got: {error}") from None
    return found
