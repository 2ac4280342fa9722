"""The demo's base models: where they are kept, and the processes that build what is missing.

A model's folder is named by a hash of its recipe and of the text it is built from; so a folder that is there is the
right one, whole, and another recipe or other data never meets it. Building happens in processes of its own
(`base_model_builder`): torch is never imported here.
"""

import hashlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from command_line import folders
from command_line.errors import BadInput, ProcessFailed
from command_line.exit_codes import ExitCode

FORMAT = 1
"""Part of every model's hash. Raise it when the same recipe shall build other models than before."""

STOP_SECONDS = 5.0

Precision = Literal["float32", "bfloat16"]
OnProgress = Callable[[str, int, int], None]
"""Called with a model's name, its training step, and the number of its steps."""


@dataclass(frozen=True)
class ModelRecipe:
    """One base model: tokenizer, architecture, sizes, and how it is pretrained."""

    name: str
    architecture: Literal["llama", "gpt2", "qwen3", "bloom"]
    tokenizer: Literal["bpe_single_digits", "bpe_digit_groups", "bpe_whole_numbers", "unigram"]
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    steps: int
    batch_size: int
    learning_rate: float
    document_share: float
    """Share of the steps that read the corpus; the others read public rows."""


@dataclass(frozen=True)
class BaseModelsRecipe:
    """All base models of a demo, and what they have in common."""

    llm: ModelRecipe
    proxy: ModelRecipe
    """A smaller sibling of the LLM with the same tokenizer; a run distils it further from the LLM."""
    slms: tuple[ModelRecipe, ...]
    max_length: int
    """Tokens a training row; texts are cut to it."""
    positions: int
    """Tokens that a model can read in use."""
    prompt_weight: float
    corpus_bytes: int
    """At most so much of the corpus is read, taken evenly from all of it."""
    precision: Precision
    seed: int = 0

    @property
    def models(self) -> tuple[ModelRecipe, ...]:
        """The LLM, the proxy, then the SLMs."""
        return (self.llm, self.proxy, *self.slms)


@dataclass(frozen=True)
class BaseModels:
    """Folders of the built models, each one for `from_pretrained`."""

    llm: Path
    proxy: Path
    slms: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        """The LLM, the proxy, then the SLMs."""
        return (self.llm, self.proxy, *self.slms)


def ensure_base_models(data_folder: Path, cache: Path, recipe: BaseModelsRecipe, on_progress: OnProgress) -> BaseModels:
    """Return the base models for a data folder, after building those that the cache lacks.

    Two processes build, one the LLM and one the small models, each on one core. They end with this call, however it
    ends, and a model that is finished by then stays. Another builder of the same model is waited for, not raced.

    Args:
        data_folder: Holds `public.jsonl` and, if there is one, `corpus.txt.gz`; nothing else in it is read.
        cache: Models are kept in its folder `base_models`.

    Raises:
        BadInput: the cache cannot be written, or the data cannot be read; names the file and the line.
        ProcessFailed: a builder failed; says with what.
    """
    models = find_base_models(data_folder, cache, recipe)
    if not all(each.exists() for each in models.all):
        folders.prepare(cache / "base_models", what="the cache folder", variable="COTUNE_CACHE")
        recipes = dict(zip(models.all, recipe.models, strict=True))
        lanes = [[each for each in lane if not each.exists()] for lane in ([models.llm], models.all[1:])]
        jobs = [_job(data_folder, recipe, {str(each): recipes[each] for each in lane}) for lane in lanes if lane]
        _run_builders(jobs, on_progress)
    return models


def find_base_models(data_folder: Path, cache: Path, recipe: BaseModelsRecipe) -> BaseModels:
    """Where the models of this recipe and this data are, or will be."""
    digest = hashlib.sha256()
    for name in ("public.jsonl", "corpus.txt.gz"):
        path = data_folder / name
        digest.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    shared = {name: value for name, value in asdict(recipe).items() if name not in ("llm", "proxy", "slms")}

    def folder(model: ModelRecipe) -> Path:
        identity = json.dumps([FORMAT, digest.hexdigest(), shared, asdict(model)], sort_keys=True)
        return cache / "base_models" / f"{model.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    return BaseModels(folder(recipe.llm), folder(recipe.proxy), tuple(folder(each) for each in recipe.slms))


def _job(data_folder: Path, recipe: BaseModelsRecipe, models: dict[str, ModelRecipe]) -> dict[str, Any]:
    """What one builder is told: where the text is, and which models to build into which folders."""
    return {
        "data_folder": str(data_folder),
        "models": {folder: asdict(model) for folder, model in models.items()},
        "max_length": recipe.max_length,
        "positions": recipe.positions,
        "prompt_weight": recipe.prompt_weight,
        "corpus_bytes": recipe.corpus_bytes,
        "precision": recipe.precision,
        "seed": recipe.seed,
    }


def _run_builders(jobs: Sequence[dict[str, Any]], on_progress: OnProgress) -> None:
    """Run a builder a job, side by side, and pass their progress on; end all of them when one fails."""
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for job in jobs:
            errors = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            builder = _start_builder(job, errors)
            stack.callback(_end, builder)
            assert builder.stdout is not None
            selector.register(builder.stdout, selectors.EVENT_READ, (builder, builder.stdout, errors))
        while selector.get_map():
            for key, _ in selector.select():
                builder, output, errors = key.data
                if line := output.readline():
                    on_progress(*json.loads(line))
                    continue
                selector.unregister(output)
                if code := builder.wait():
                    failure = BadInput if code == ExitCode.BAD_INPUT else ProcessFailed
                    raise failure(f"building the base models failed: {_last_line(errors)}")


def _start_builder(job: dict[str, Any], errors: IO[str]) -> "subprocess.Popen[str]":
    builder = subprocess.Popen(
        [sys.executable, "-m", "command_line.base_model_builder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        # One thread a builder, from the start: a library that counts the cores at import would take them all.
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        # A Ctrl-C at the terminal is for us, who then end the builder.
        start_new_session=True,
    )
    assert builder.stdin is not None
    builder.stdin.write(json.dumps(job))
    builder.stdin.close()
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
    if builder.stdout is not None:
        builder.stdout.close()


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    return lines[-1] if lines else "it said nothing"
