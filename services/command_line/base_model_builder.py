"""The process that builds base models. It reads its job as JSON from standard input and writes its progress.

Started by `base_models`. It writes JSON values, one a line: an array is progress (a model's name, its step, the number
of its steps), a string is a note for a person, and `READY` says that text and tokenizers are there; then it waits for
the line `GO`. When nobody reads any more, because the parent is gone, writing fails and the process ends.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assets.errors import DataFileError
from assets.file_lock import locked
from command_line.base_model_texts import Texts, UnfitText, read_texts
from command_line.base_models import GO, READY, SUMMARY_FILE
from command_line.exit_codes import ExitCode

if TYPE_CHECKING:
    from command_line.base_model_training import Trained

PROGRESS_SECONDS = 0.2


def main() -> None:
    """Build every model of the job that is not there yet. Ends with `ExitCode.BAD_INPUT` if its text is unfit."""
    job = json.loads(sys.stdin.readline())
    try:
        texts = read_texts(job)
        make_tokenizers(job, texts)
    except (DataFileError, UnfitText) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(ExitCode.BAD_INPUT)
    say(READY)
    if sys.stdin.readline().strip() == GO:
        build_models(job, texts)


def make_tokenizers(job: dict[str, Any], texts: Texts) -> None:
    """Train the tokenizers that are not there yet. A model's folder that is there needs none.

    Raises:
        UnfitText: the text gives too few entries.
    """
    for folder, entry in job["models"].items():
        tokenizer = Path(entry["tokenizer"])
        tokenizer.parent.mkdir(parents=True, exist_ok=True)
        with locked(Path(f"{tokenizer}.lock")):
            if tokenizer.exists() or Path(folder).exists():
                continue
            from command_line.base_model_training import train_recipes_tokenizer

            recipe, shared = entry["recipe"], job["shared"]
            made = train_recipes_tokenizer(recipe, shared, texts)
            least = shared["least_vocab_share"] * recipe["vocab_size"]
            if len(made) < least:
                raise UnfitText(
                    f"{recipe['name']}: expected text for a vocabulary of {recipe['vocab_size']} entries, this text "
                    f"gives {len(made)}; set vocab_size to at most {len(made)}, or give more text"
                )
            save(tokenizer, [made])


def build_models(job: dict[str, Any], texts: Texts) -> None:
    """Build what is missing, one model after the other; a model that another process builds is waited for."""
    for folder, entry in job["models"].items():
        recipe = entry["recipe"]
        progress = _Progress(recipe["name"])
        progress(0, recipe["steps"])
        with locked(Path(f"{folder}.lock")):
            if not Path(folder).exists():
                _build(Path(folder), entry, job, texts, progress=progress)


def _build(folder: Path, entry: dict[str, Any], job: dict[str, Any], texts: Texts, *, progress: "_Progress") -> None:
    # Late, because it takes seconds: broken data and a Ctrl-C do not wait for it.
    from command_line.base_model_card import card
    from command_line.base_model_training import train_recipe

    unfinished = folder.parent / ".unfinished" / folder.name
    trained: Trained = train_recipe(
        entry["recipe"],
        job["shared"],
        texts,
        tokenizer_folder=Path(entry["tokenizer"]),
        identity=folder.name,
        state_folder=unfinished,
        on_progress=progress,
        on_note=say,
    )
    text = card(trained, entry["recipe"], job["shared"], texts, files=job["text"]["files"], command=job["command"])
    about = {"README.md": text, SUMMARY_FILE: json.dumps(trained.summary(), indent=1) + "\n"}
    save(folder, [trained.model, trained.tokenizer], about)
    shutil.rmtree(unfinished, ignore_errors=True)


def say(message: object) -> None:
    """Write a line to the parent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class _Progress:
    """Writes a line a few times a second, and at the last step."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._written = 0.0

    def __call__(self, step: int, steps: int, _: float = 0.0) -> None:
        now = time.monotonic()
        if now - self._written >= PROGRESS_SECONDS or step == steps:
            self._written = now
            say([self._name, step, steps])


def save(folder: Path, parts: Sequence[Any], texts: Mapping[str, str] | None = None) -> None:
    """Write beside the folder, then rename: the folder is whole or not there."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    # Left by a builder that was killed; the lock says that it is not there any more.
    shutil.rmtree(unfinished, ignore_errors=True)
    for part in parts:
        part.save_pretrained(unfinished)
    for name, text in (texts or {}).items():
        (unfinished / name).write_text(text, encoding="utf-8")
    for path in (*unfinished.iterdir(), unfinished):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    unfinished.rename(folder)


if __name__ == "__main__":
    main()
