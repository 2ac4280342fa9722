"""The base models of an experiment: each loaded once, lent to whoever trains on it, and given back as it was."""

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from assets.errors import DeviceError, ModelFolderError
from assets.models import list_model_files, load_language_model, read_config, read_tokenizer
from cotuning.language_model import LanguageModel
from protocol.runs import ModelLoading
from simulation.errors import SetupError


def hush_transformers() -> None:
    """No progress bars and no warnings of names that the library itself will change: they tear what a person reads."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


class BaseModels:
    """Loads a model when it is first asked for.

    Args:
        loading: how the LLM is held; SLMs are float32, on the same kind of device.
    """

    def __init__(self, loading: ModelLoading) -> None:
        self._loading = loading
        self._loaded: dict[tuple[str, bool], LanguageModel] = {}

    def llm(self, source: str) -> LanguageModel:
        """The LLM.

        Raises:
            SetupError: it cannot be loaded, or not so.
        """
        return self._load(source, llm=True)

    def slm(self, source: str) -> LanguageModel:
        """A small model; devices that have the same one share it. Raises as `llm`."""
        return self._load(source, llm=False)

    def fresh(self, source: str) -> LanguageModel:
        """A model of the caller's own, to change as it likes; float32, on the CPU. Raises as `llm`."""
        return _load(source, ModelLoading())

    def _load(self, source: str, *, llm: bool) -> LanguageModel:
        if (source, llm) not in self._loaded:
            held = self._loading if llm else ModelLoading(devices=self._loading.devices)
            self._loaded[source, llm] = _load(source, held)
        return self._loaded[source, llm]


def _load(source: str, held: ModelLoading) -> LanguageModel:
    try:
        return load_language_model(
            source, dtype=getattr(torch, held.dtype), four_bit=held.four_bit, devices=held.devices
        )
    except (ModelFolderError, DeviceError) as error:
        raise SetupError(str(error)) from None


def model_problems(sources: Iterable[str], *, longest_row: int) -> list[str]:
    """What is wrong with the models, as far as it can be told without reading weights: one sentence each.

    Args:
        sources: folders or hub names.
        longest_row: tokens that each must be able to read.
    """
    problems = []
    for source in dict.fromkeys(sources):
        try:
            read_tokenizer(source)
            positions = getattr(read_config(source), "max_position_embeddings", None)
            if positions is not None and positions < longest_row:
                problems.append(
                    f"{source}: expected a model that reads {longest_row} tokens, it reads {positions}: choose a less "
                    "`measured_length` (`evaluation.max_new_tokens` come to it), or `max_length` of what is trained"
                )
        except ModelFolderError as error:
            problems.append(str(error))
    return problems


def model_digest(source: str) -> str:
    """SHA-256 of a model folder's files, hex; of a hub name, of the name."""
    folder, digest = Path(source), hashlib.sha256()
    if not folder.is_dir():
        return hashlib.sha256(source.encode()).hexdigest()
    for path in list_model_files(folder):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def described(source: str) -> dict[str, Any]:
    """A model's `architecture`, `tokenizer` and number of `parameters`, without reading its weights.

    Raises:
        ModelFolderError: there is no such model.
    """
    config, tokenizer = read_config(source), read_tokenizer(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kind = type(tokenizer.backend_tokenizer.model).__name__ if hasattr(tokenizer, "backend_tokenizer") else "slow"
    return {
        "architecture": str(config.model_type),
        "tokenizer": f"{kind}, {len(tokenizer)} tokens",
        "parameters": sum(each.numel() for each in model.parameters()),
    }
