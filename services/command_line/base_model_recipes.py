"""What base models are made of and how they are pretrained, as data; read from TOML.

Presets lie beside this file in `presets/`. Every field is explained in `docs/pretraining.md`.
"""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from command_line.errors import BadInput

PRESETS = ("tiny", "small", "medium")

Precision = Literal["float32", "bfloat16"]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_STRICT)
class ModelRecipe:
    """One base model: tokenizer, architecture, sizes, and how it is pretrained."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
    architecture: Literal["llama", "gpt2", "qwen3", "bloom"]
    tokenizer: Literal["bpe_single_digits", "bpe_digit_groups", "bpe_whole_numbers", "unigram"]
    vocab_size: Annotated[int, Field(ge=280)]
    """Entries; 256 of them stand for single bytes."""
    hidden_size: Count
    layers: Count
    heads: Count
    steps: Count
    batch_size: Count
    """Rows of `max_length` tokens a step."""
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    document_share: Share
    """Share of the steps that read the corpus; the others read rows of the pool."""
    micro_batch_size: Count | None = None
    """Rows in memory at a time; all of the batch if not given."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            raise ValueError(
                f"expected a hidden_size that is an even multiple of heads, got {self.hidden_size} and {self.heads}"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class BaseModelsRecipe:
    """Base models that belong together, and what they have in common."""

    llm: ModelRecipe
    slms: tuple[ModelRecipe, ...]
    max_length: Annotated[int, Field(ge=8)]
    """Tokens a training row; texts are cut to it."""
    positions: Count
    """Tokens that a model can read in use."""
    prompt_weight: Share
    """Weight of a prompt's tokens in the loss; a response's weigh 1."""
    corpus_bytes: Count
    """At most so much of the corpus is read, taken evenly from all of it."""
    precision: Precision
    proxy: ModelRecipe | None = None
    """A smaller sibling of the LLM with the same tokenizer; a run distils it further from the LLM."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    packed: bool = False
    """Several texts a row; else one a row, padded, with texts of like length together."""
    tokenizer_bytes: Count | None = None
    """At most so much of the text trains the tokenizers, taken evenly; all of it if not given."""
    least_vocab_share: Share = 0.75
    """A text that gives a tokenizer fewer entries than this share of `vocab_size` is refused."""
    held_out_bytes: Annotated[int, Field(ge=0)] = 0
    """So much of the corpus is not trained on but measured on."""
    held_out_rows: Annotated[int, Field(ge=0)] = 0
    """So many rows of the pool are not trained on but measured on."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two measurements on the held-out text, after each of which the state is kept; 0: only at the end,
    and no state is kept."""
    device: Literal["cpu", "auto"] = "cpu"
    """`auto`: the first GPU if there is one."""
    threads: Count = 1
    """CPU threads a model; part of a model's identity, because sums are rounded otherwise with another number."""
    processes: Count = 2
    """Models trained at a time: the LLM in one process, the small ones one after the other in a second."""

    @property
    def models(self) -> tuple[ModelRecipe, ...]:
        """The LLM, the proxy if there is one, then the SLMs."""
        return (self.llm, *([self.proxy] if self.proxy else []), *self.slms)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [each.name for each in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"expected a name of its own for each model, got {', '.join(names)}")
        if self.positions < self.max_length:
            raise ValueError(f"expected positions of at least max_length, got {self.positions} and {self.max_length}")
        if self.proxy and (self.proxy.tokenizer, self.proxy.vocab_size) != (self.llm.tokenizer, self.llm.vocab_size):
            raise ValueError("expected the proxy to have the LLM's tokenizer and vocab_size")
        return self


def read_recipe(path: Path) -> BaseModelsRecipe:
    """Read a recipe from TOML: the fields of `BaseModelsRecipe`, tables `llm` and `proxy`, a list of tables `slms`.

    Raises:
        BadInput: no such file, no TOML, or a field that is unknown, missing or out of its range.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"expected a TOML file at {path}, got: {getattr(error, 'strerror', None) or error}") from None
    return _parse(content, str(path))


def preset(name: str) -> BaseModelsRecipe:
    """One of `PRESETS`.

    Raises:
        BadInput: there is none of that name.
    """
    if name not in PRESETS:
        raise BadInput(f"expected a preset of {', '.join(PRESETS)}, got {name!r}")
    return _parse((resources.files("command_line") / "presets" / f"{name}.toml").read_text("utf-8"), f"preset {name}")


def _parse(content: str, place: str) -> BaseModelsRecipe:
    try:
        table = with_precision(tomllib.loads(content))
        # Through JSON, whose strict reading knows lists for tuples and whole numbers for floats.
        return TypeAdapter(BaseModelsRecipe).validate_json(json.dumps(table, default=str))
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{place}: expected TOML, got: {error}") from None
    except ValidationError as error:
        raise BadInput(f"{place}: {'; '.join(_problems(error))}", next_step=_known_fields()) from None


def _problems(error: ValidationError) -> Iterator[str]:
    for each in error.errors():
        where = ".".join(str(part) for part in each["loc"])
        message = each["msg"].removeprefix("Value error, ")
        given: Any = each["input"]
        shown = "" if each["type"] in ("missing", "value_error") else f", got {given!r:.80}"
        yield f"{where}: {message}{shown}" if where else f"{message}{shown}"


def _known_fields() -> str:
    return "a model's fields: " + ", ".join(each.name for each in fields(ModelRecipe)) + "; see docs/pretraining.md"


def with_precision(value: Any) -> Any:
    """The value, with each `precision = "auto"` in a table of it as `fast_precision` has it on this machine."""
    if isinstance(value, list):
        return [with_precision(each) for each in value]
    if not isinstance(value, dict):
        return value
    inner = {key: with_precision(each) for key, each in value.items()}
    return inner | {"precision": fast_precision()} if inner.get("precision") == "auto" else inner


def fast_precision(processor: str | None = None) -> Precision:
    """bfloat16 where the processor multiplies it, by AMX or AVX-512; else float32.

    A processor that does not emulates it: on an EPYC with AVX2 alone, a linear layer of 384 x 1,536 under autocast
    reaches 7 GFLOP/s, and 55 in float32.

    Args:
        processor: Text of `/proc/cpuinfo`; default: this machine's, float32 if it cannot be read.
    """
    if processor is None:
        path = Path("/proc/cpuinfo")
        processor = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return "float32" if {"amx_bf16", "avx512_bf16"}.isdisjoint(processor.split()) else "bfloat16"
