"""One base model of a recipe, from text to trained model: the part of the builder that needs torch."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from assets.atomic import write_atomically
from assets.checkpoints import FolderCheckpoints
from assets.devices import chosen_devices
from command_line.base_model_texts import Texts
from cotuning.examples import Example, render_prompt
from cotuning.pretraining import make_model, pretrain, response_bits_per_byte, text_bits_per_byte
from cotuning.pretraining_text import TrainingText
from cotuning.seeding import derive_seed
from cotuning.tokenizer_training import train_tokenizer

MEASURED_AT_ONCE = 16


@dataclass(frozen=True)
class Measurement:
    """Bits a byte on what is held out, after some steps; None where nothing of the kind is held out."""

    step: int
    tokens: int
    text: float | None
    responses: float | None

    def __str__(self) -> str:
        parts = [f"{self.tokens:,} tokens"]
        parts += [f"text {self.text:.3f}"] if self.text is not None else []
        parts += [f"responses {self.responses:.3f}"] if self.responses is not None else []
        return ", ".join(parts) + " bits a byte"


@dataclass(frozen=True)
class Trained:
    """A trained model and what its card tells of the training."""

    model: Any
    tokenizer: Any
    loss: float
    tokens: int
    measurements: tuple[Measurement, ...]
    device: str

    @property
    def parameters(self) -> int:
        """Tied ones once."""
        return sum(each.numel() for each in self.model.parameters())

    def summary(self) -> dict[str, Any]:
        """The numbers, as JSON."""
        return {
            "parameters": self.parameters,
            "loss": self.loss,
            "tokens": self.tokens,
            "device": self.device,
            "measurements": [asdict(each) for each in self.measurements],
        }


def train_recipes_tokenizer(recipe: dict[str, Any], shared: dict[str, Any], texts: Texts) -> Any:
    """The tokenizer of a model's recipe; the LLM's is the proxy's."""
    all_texts = [_asked(row).prompt + row.output for row in texts.rows] + list(texts.documents)
    if shared["tokenizer_bytes"]:
        total = sum(map(len, all_texts))
        all_texts = all_texts[:: max(1, -(-total // shared["tokenizer_bytes"]))]
    return train_tokenizer(
        recipe["tokenizer"], all_texts, vocab_size=recipe["vocab_size"], max_length=shared["positions"]
    )


def train_recipe(
    recipe: dict[str, Any],
    shared: dict[str, Any],
    texts: Texts,
    *,
    tokenizer_folder: Path,
    identity: str,
    state_folder: Path,
    on_progress: Callable[[int, int, float], None],
    on_note: Callable[[str], None],
) -> Trained:
    """Train one model, or go on with it from the state in `state_folder`.

    Args:
        recipe: Fields of a `ModelRecipe`.
        shared: The other fields of its `BaseModelsRecipe`.
        texts: To train and to measure on.
        tokenizer_folder: Of the trained tokenizer.
        identity: Names all that the training depends on.
        state_folder: For checkpoints and measurements; the caller removes it.
        on_progress: See `pretrain`.
        on_note: Told in a sentence why a state that is there is not used.
    """
    torch.set_num_threads(shared["threads"])
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    device = chosen_devices(shared["device"])[0]
    model = _fresh_model(recipe, shared, tokenizer).to(device)
    every = shared["checkpoint_every"]
    measured = _Measured(state_folder / "measurements.json")

    def measure(step: int, tokens: int) -> None:
        measured.add(_measure(model, tokenizer, texts, shared, Measurement(step, tokens, None, None)))
        on_note(f"{recipe['name']}: step {step:,} of {recipe['steps']:,}, {measured.all[-1]}")

    done = pretrain(
        model,
        tokenizer,
        [_asked(row) for row in texts.rows],
        [TrainingText("", each) for each in texts.documents],
        document_share=recipe["document_share"],
        steps=recipe["steps"],
        batch_size=recipe["batch_size"],
        micro_batch_size=recipe["micro_batch_size"],
        max_length=shared["max_length"],
        learning_rate=recipe["learning_rate"],
        weight_decay=recipe["weight_decay"],
        schedule=recipe["schedule"],
        prompt_weight=shared["prompt_weight"],
        precision=shared["precision"],
        packed=shared["packed"],
        seed=derive_seed(shared["seed"], recipe["name"], "order"),
        on_progress=on_progress,
        measure_every=every or recipe["steps"],
        on_measure=measure if texts.held_out_documents or texts.held_out_rows else None,
        checkpoints=FolderCheckpoints(state_folder, configuration=identity, every=every, on_ignored=on_note)
        if every
        else None,
    )
    return Trained(model.cpu(), tokenizer, done.loss, done.num_tokens, measured.all, device)


def _fresh_model(recipe: dict[str, Any], shared: dict[str, Any], tokenizer: Any) -> Any:
    return make_model(
        recipe["architecture"],
        tokenizer,
        hidden_size=recipe["hidden_size"],
        layers=recipe["layers"],
        heads=recipe["heads"],
        max_length=shared["positions"],
        seed=derive_seed(shared["seed"], recipe["name"], "weights"),
    )


def _asked(row: Example) -> TrainingText:
    return TrainingText(render_prompt(None, row), row.output)


def _measure(model: Any, tokenizer: Any, texts: Texts, shared: dict[str, Any], at: Measurement) -> Measurement:
    how: dict[str, Any] = {"precision": shared["precision"]}
    if texts.held_out_documents:
        length = shared["max_length"]
        bits = text_bits_per_byte(
            model, tokenizer, texts.held_out_documents, length=length, batch_size=MEASURED_AT_ONCE, **how
        )
        at = replace(at, text=bits)
    if texts.held_out_rows:
        bits = response_bits_per_byte(model, tokenizer, texts.held_out_rows, max_length=shared["positions"], **how)
        at = replace(at, responses=bits)
    return at


class _Measured:
    """Measurements by step, on disk, so that a training that goes on knows the earlier ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_step: dict[int, Measurement] = {}
        if path.is_file():
            found = [Measurement(**each) for each in json.loads(path.read_bytes())]
            self._by_step = {each.step: each for each in found}

    @property
    def all(self) -> tuple[Measurement, ...]:
        return tuple(self._by_step[step] for step in sorted(self._by_step))

    def add(self, measurement: Measurement) -> None:
        self._by_step[measurement.step] = measurement
        write_atomically(self._path, json.dumps([asdict(each) for each in self.all]).encode())
