"""The process that builds base models. It reads its job as JSON from standard input and writes its progress.

Started by `base_models`. A line of progress is a JSON array: a model's name, its step, the number of its steps.
When nobody reads them any more, because the parent is gone, writing fails and the process ends.
"""

import fcntl
import gzip
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from assets.data import read_examples
from assets.errors import DataFileError
from command_line.exit_codes import ExitCode
from cotuning.examples import Example, render_prompt

PROGRESS_SECONDS = 0.2


def main() -> None:
    """Build every model of the job that is not there yet. Ends with `ExitCode.BAD_INPUT` if its data is broken."""
    job = json.load(sys.stdin)
    try:
        rows = read_examples(Path(job["data_folder"]) / "public.jsonl")
        documents = read_documents(Path(job["data_folder"]) / "corpus.txt.gz", job["corpus_bytes"])
    except DataFileError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(ExitCode.BAD_INPUT)
    build_models(job, rows, documents)


def read_documents(path: Path, max_bytes: int) -> list[str]:
    """Read documents, which blank lines divide, evenly from the whole corpus; none if there is no such file.

    Raises:
        DataFileError: it is not gzipped UTF-8.
    """
    if not path.is_file():
        return []
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataFileError(f"{path}: expected gzipped UTF-8 text, got: {error}") from None
    documents = [each for each in text.strip().split("\n\n") if each.strip()]
    return documents[:: max(1, -(-len(text) // max_bytes))]


def build_models(job: dict[str, Any], rows: Sequence[Example], documents: Sequence[str]) -> None:
    """Build what is missing, one model after the other; a model that another process builds is waited for."""
    for folder, model in job["models"].items():
        progress = _Progress(model["name"])
        progress(0, model["steps"])
        with _locked(Path(f"{folder}.lock")):
            if not Path(folder).exists():
                _build(Path(folder), model, job, rows, documents, progress=progress)


def _build(
    folder: Path,
    model: dict[str, Any],
    job: dict[str, Any],
    rows: Sequence[Example],
    documents: Sequence[str],
    *,
    progress: "_Progress",
) -> None:
    # Late, because it takes seconds: broken data and a Ctrl-C do not wait for it.
    import torch
    from transformers.utils import logging

    from cotuning.pretraining import TrainingText, make_model, pretrain, train_tokenizer
    from cotuning.seeding import derive_seed

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    asked = [TrainingText(render_prompt(None, row), row.output) for row in rows]
    running = [TrainingText("", each) for each in documents]
    tokenizer = train_tokenizer(
        model["tokenizer"],
        (each.prompt + each.text for each in (*asked, *running)),
        vocab_size=model["vocab_size"],
        max_length=job["positions"],
    )
    built = make_model(
        model["architecture"],
        tokenizer,
        hidden_size=model["hidden_size"],
        layers=model["layers"],
        heads=model["heads"],
        max_length=job["positions"],
        seed=derive_seed(job["seed"], model["name"], "weights"),
    )
    pretrain(
        built,
        tokenizer,
        asked,
        running,
        document_share=model["document_share"],
        steps=model["steps"],
        batch_size=model["batch_size"],
        max_length=job["max_length"],
        learning_rate=model["learning_rate"],
        prompt_weight=job["prompt_weight"],
        precision=job["precision"],
        seed=derive_seed(job["seed"], model["name"], "order"),
        on_progress=progress,
    )
    _save(built, tokenizer, folder)


class _Progress:
    """Writes a line a few times a second, and at the last step."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._written = 0.0

    def __call__(self, step: int, steps: int, _: float = 0.0) -> None:
        now = time.monotonic()
        if now - self._written >= PROGRESS_SECONDS or step == steps:
            self._written = now
            sys.stdout.write(json.dumps([self._name, step, steps]) + "\n")
            sys.stdout.flush()


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write beside the folder, then rename: the folder is whole or not there."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    # Left by a builder that was killed; the lock says that it is not there any more.
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    for path in (*unfinished.iterdir(), unfinished):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    unfinished.rename(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system takes back when this process ends, however it ends."""
    with open(path, "a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
