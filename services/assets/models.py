"""Models and tokenizers as ordinary Hugging Face folders, or by their names on the hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from assets.devices import Devices, chosen_devices, four_bit_config, spread_layers
from assets.errors import ModelFolderError
from cotuning.language_model import LanguageModel

_HOLDS = "a model folder holds config.json, *.safetensors and the tokenizer's files"

_ATTENTION = (None, "eager", "sdpa", "flex_attention")
"""What a config may choose. For others transformers fetches code from the hub, where `kernels` is installed."""

_TOKENIZER_FILES = ("*token*", "vocab.*", "*.model", "merges.txt", "*.tiktoken")
"""Of some families transformers makes an empty tokenizer where there is none of these."""

_LOADING_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError, ArithmeticError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises on a config whose values make no sense, among other things."""


def load_language_model(
    path_or_name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    four_bit: bool = False,
    devices: Devices = "cpu",
) -> LanguageModel:
    """Load a causal language model from a folder or by its hub name; frozen, ready to be adapted.

    No code of the model's author is run, and no pickled weights are read.

    Args:
        path_or_name: of the model.
        dtype: of the weights.
        four_bit: hold the linear layers, but the head, in 4 bits; see `devices.four_bit_config`.
        devices: where to; over several GPUs the layers are dealt.

    Raises:
        ModelFolderError: there is no such model, it is incomplete, or it is not a causal language model.
        DeviceError: 4-bit weights cannot be had here.
    """
    name = str(path_or_name)
    config = read_config(name)
    options: dict[str, Any] = {"quantization_config": four_bit_config()} if four_bit else {}
    with _told_as_model_folder_error(name):
        names = chosen_devices(devices)
        if names != ["cpu"]:
            options["device_map"] = spread_layers(config, names)
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        tokenizer = read_tokenizer(name)
        lm = LanguageModel.of(model.eval().requires_grad_(False), tokenizer)
    if report["missing_keys"]:  # transformers would go on with random values
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelFolderError(f"{name}: expected all weights, {len(report['missing_keys'])} are missing: {missing}")
    return lm


def read_config(path_or_name: str | Path) -> Any:
    """The config of a model, without its weights.

    Raises:
        ModelFolderError: there is no such model, or its config cannot be used.
    """
    name = str(path_or_name)
    _require_model(name)
    with _told_as_model_folder_error(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config._attn_implementation not in _ATTENTION:
            raise ValueError(f"config.json asks for attention {config._attn_implementation!r}")
    return config


def read_tokenizer(path_or_name: str | Path) -> Any:
    """The tokenizer of a model, without its weights.

    Raises:
        ModelFolderError: there is no such model, or its tokenizer cannot be read.
    """
    name = str(path_or_name)
    _require_model(name)
    _require_tokenizer(Path(name).expanduser())
    with _told_as_model_folder_error(name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


@contextmanager
def _told_as_model_folder_error(name: str) -> Iterator[None]:
    try:
        yield
    except _LOADING_ERRORS as error:
        raise ModelFolderError(f"{name}: expected a causal language model ({_HOLDS}): {error}") from error


def save_language_model(lm: LanguageModel, folder: Path) -> None:
    """Write model and tokenizer as `from_pretrained` reads them. The model has no adapters on."""
    folder.mkdir(parents=True, exist_ok=True)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def list_model_files(folder: Path) -> list[Path]:
    """The files of a model folder by name: what a device needs to load it.

    Raises:
        ModelFolderError: no folder, or one without config.json.
    """
    _require_folder(folder)
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def folder_identity(path_or_name: str) -> tuple[object, ...]:
    """What changes when the files of a model folder do: their names, sizes and times. Of a hub name, the name."""
    folder = Path(path_or_name)
    if not folder.is_dir():
        return (path_or_name,)
    files = sorted((entry.name, entry.stat()) for entry in os.scandir(folder) if entry.is_file())
    return (path_or_name, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))


def _require_model(name: str) -> None:
    """A name that looks like a path must be a folder; anything else may be a hub name (`owner/model` or `model`)."""
    path = Path(name).expanduser()
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.exists() or looks_like_path:
        _require_folder(path)


def _require_tokenizer(folder: Path) -> None:
    if folder.is_dir() and not any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern)):
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise ModelFolderError(f"{folder}: expected the files of a tokenizer (tokenizer.json), found {names}; {_HOLDS}")


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise ModelFolderError(f"{folder}: expected a model folder, found {found}; {_HOLDS}")
    if not (folder / "config.json").is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "no files"
        raise ModelFolderError(f"{folder}: expected config.json, found {names}; {_HOLDS}")
