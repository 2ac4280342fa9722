"""Base models: where they are kept, and the processes that build what is missing.

A model's folder is named by a hash of its recipe and of the text it is built from; so a folder that is there is the
right one, whole, and another recipe or other data never meets it. Building happens in processes of its own
(`base_model_builder`): torch is never imported here.

<root>/<model>-<hash>/            a Hugging Face folder with a model card
<root>/.tokenizers/<hash>/        models with equal tokenizers share one
<root>/.unfinished/<model>-<hash>/    the state of a training that goes on when it is asked for again
"""

import hashlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from command_line import folders
from command_line.base_model_recipes import BaseModelsRecipe, ModelRecipe
from command_line.errors import BadInput, ProcessFailed
from command_line.exit_codes import ExitCode

FORMAT = 2
"""Part of every model's hash. Raise it when the same recipe shall build other models than before."""

STOP_SECONDS = 5.0
READY, GO = "ready", "go"
"""What a builder says when all that can be wrong with its job has been looked at, and what it then waits for."""

SUMMARY_FILE = "pretraining.json"
"""In a model's folder: parameters, loss, tokens and measurements, for programs; the card is for people."""

NOT_IDENTITY = ("llm", "proxy", "slms", "processes", "least_vocab_share")
"""Fields of a recipe that are no part of a model's hash, or only its own are."""

OnProgress = Callable[[str, int, int], None]
"""Called with a model's name, its training step, and the number of its steps."""


@dataclass(frozen=True)
class PretrainingText:
    """What base models read.

    Attributes:
        corpus: Plain text, see `assets.corpora`; None for none.
        pools: Files of rows, see `assets.data`.
        dropped_documents: Places, in what is read of the corpus, of documents that are left out.
        dropped_rows: Places of rows left out, for each pool.
    """

    corpus: Path | None
    pools: tuple[Path, ...]
    dropped_documents: tuple[int, ...] = ()
    dropped_rows: tuple[tuple[int, ...], ...] = ()

    def describe(self) -> list[dict[str, Any]]:
        """Name, bytes and SHA-256 of each file, the corpus first."""
        found = []
        for path in ([self.corpus] if self.corpus else []) + list(self.pools):
            content = path.read_bytes()
            found.append({"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
        return found


@dataclass(frozen=True)
class BaseModels:
    """Folders of the built models, each one for `from_pretrained`."""

    llm: Path
    proxy: Path | None
    slms: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        """The LLM, the proxy if there is one, then the SLMs."""
        return (self.llm, *([self.proxy] if self.proxy else []), *self.slms)


def demo_text(data_folder: Path) -> PretrainingText:
    """What the demo's base models read of a data folder: `public.jsonl` and, if there is one, `corpus.txt.gz`."""
    corpus = data_folder / "corpus.txt.gz"
    return PretrainingText(corpus if corpus.is_file() else None, (data_folder / "public.jsonl",))


def ensure_base_models(
    text: PretrainingText,
    root: Path,
    recipe: BaseModelsRecipe,
    on_progress: OnProgress,
    *,
    command: str = "",
    on_note: Callable[[str], None] = lambda _: None,
) -> BaseModels:
    """Return the base models, after building those that are not there yet.

    As many processes as the recipe says build, each model on the recipe's number of threads. They end with this call,
    however it ends; a model that is finished by then stays, and one that is not goes on from its last state when it is
    asked for again. Another builder of the same model is waited for, not raced. No model is trained before every
    builder has read its text and has its tokenizers.

    Args:
        text: Files that are there.
        root: Where the models are kept.
        command: What was asked for, for the model cards.
        on_note: Told sentences about what is unusual.

    Raises:
        BadInput: the root cannot be written, or the text cannot be read or does not suffice; names the file.
        ProcessFailed: a builder failed; says with what.
    """
    models = find_base_models(text, root, recipe)
    if not all(each.exists() for each in models.all):
        folders.prepare(root, what="the folder of the base models", variable="COTUNE_CACHE or --out")
        named = list(zip(models.all, recipe.models, strict=True))
        lanes = [named] if recipe.processes == 1 else [named[:1], named[1:]]
        missing = [{str(each): model for each, model in lane if not each.exists()} for lane in lanes]
        jobs = [_job(text, root, recipe, lane) | {"command": command} for lane in missing if lane]
        _run_builders(jobs, on_progress, on_note)
    return models


def find_base_models(text: PretrainingText, root: Path, recipe: BaseModelsRecipe) -> BaseModels:
    """Where the models of this recipe and this text are, or will be."""
    shared = {name: value for name, value in asdict(recipe).items() if name not in NOT_IDENTITY}
    read = _identity_of(text)

    def folder(model: ModelRecipe) -> Path:
        return root / f"{model.name}-{_hash([FORMAT, read, shared, asdict(model)])}"

    proxy = folder(recipe.proxy) if recipe.proxy else None
    return BaseModels(folder(recipe.llm), proxy, tuple(folder(each) for each in recipe.slms))


def _identity_of(text: PretrainingText) -> list[object]:
    digests = [each["sha256"] for each in text.describe()]
    return [text.corpus is not None, digests, text.dropped_documents, text.dropped_rows]


def _hash(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _job(text: PretrainingText, root: Path, recipe: BaseModelsRecipe, models: dict[str, ModelRecipe]) -> dict[str, Any]:
    """What one builder is told: where the text is, and which models to build into which folders."""
    read = _identity_of(text)
    held_out = [recipe.held_out_bytes, recipe.held_out_rows, recipe.corpus_bytes, recipe.tokenizer_bytes]

    def tokenizer(model: ModelRecipe) -> str:
        identity = [FORMAT, read, held_out, recipe.positions, model.tokenizer, model.vocab_size]
        return str(root / ".tokenizers" / _hash(identity))

    return {
        "text": {
            "corpus": str(text.corpus) if text.corpus else None,
            "pools": [str(each) for each in text.pools],
            "dropped_documents": text.dropped_documents,
            "dropped_rows": text.dropped_rows,
            "files": text.describe(),
        },
        "models": {
            folder: {"recipe": asdict(model), "tokenizer": tokenizer(model)} for folder, model in models.items()
        },
        "shared": {name: value for name, value in asdict(recipe).items() if name not in ("llm", "proxy", "slms")},
    }


def _run_builders(jobs: Sequence[dict[str, Any]], on_progress: OnProgress, on_note: Callable[[str], None]) -> None:
    """Run a builder a job, side by side, and pass their progress on; end all of them when one fails."""
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        builders = []
        for job in jobs:
            errors = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            builder = _start_builder(job, errors)
            stack.callback(_end, builder)
            assert builder.stdout is not None
            selector.register(builder.stdout, selectors.EVENT_READ, (builder, _Lines(builder.stdout.fileno()), errors))
            builders.append(builder)
        num_ready = 0
        while selector.get_map():
            for key, _ in selector.select():
                builder, lines, errors = key.data
                for message in lines.read():
                    if message == READY:
                        num_ready += 1
                        if num_ready == len(builders):
                            _tell_to_go(builders)
                    elif isinstance(message, str):
                        on_note(message)
                    else:
                        on_progress(*message)
                if not lines.ended:
                    continue
                selector.unregister(key.fileobj)
                if code := builder.wait():
                    failure = BadInput if code == ExitCode.BAD_INPUT else ProcessFailed
                    raise failure(f"building the base models failed: {_last_line(errors)}")


class _Lines:
    """JSON values, one a line, from a pipe. Nothing is left in a buffer that the selector does not know of."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        self.ended = False

    def read(self) -> list[Any]:
        """The values that have come; waits for a first byte."""
        received = os.read(self._descriptor, 1 << 16)
        self.ended = not received
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [json.loads(line) for line in lines]


def _tell_to_go(builders: "Sequence[subprocess.Popen[str]]") -> None:
    for builder in builders:
        assert builder.stdin is not None
        with suppress(BrokenPipeError):  # It has ended; why, its exit code says.
            builder.stdin.write(f"{GO}\n")
            builder.stdin.close()


def _start_builder(job: dict[str, Any], errors: IO[str]) -> "subprocess.Popen[str]":
    threads = job["shared"]["threads"]
    builder = subprocess.Popen(
        [sys.executable, "-m", "command_line.base_model_builder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        encoding="utf-8",
        # From the start: a library that counts the cores at import would take them all.
        env=os.environ
        | {
            "OMP_NUM_THREADS": str(threads),
            "RAYON_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false" if threads == 1 else "true",
        },
        # A Ctrl-C at the terminal is for us, who then end the builder.
        start_new_session=True,
    )
    assert builder.stdin is not None
    builder.stdin.write(json.dumps(job) + "\n")
    builder.stdin.flush()
    return builder


def _end(builder: "subprocess.Popen[str]") -> None:
    """End a builder if it still runs. It has nothing to lose but an unfinished model."""
    if builder.poll() is None:
        builder.terminate()
        try:
            builder.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            builder.kill()
            builder.wait()
    for pipe in (builder.stdin, builder.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    return lines[-1] if lines else "it said nothing"
