"""Adapters in peft's own format: `adapter_config.json` and `adapter_model.safetensors` in a folder."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from assets.atomic import write_atomically
from assets.errors import ModelFolderError
from assets.tensors import read_tensors, tensors_to_bytes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def save_adapter(folder: Path, state: Mapping[str, Tensor], peft_config: LoraConfig, base_name: str) -> None:
    """Write an adapter so that `peft.PeftModel.from_pretrained(base, folder)` loads it.

    Args:
        folder: made if missing; an adapter there is replaced.
        state: from `cotuning.adapters.adapter_state`.
        peft_config: from `cotuning.adapters.lora_config`.
        base_name: of the model it belongs to, a path or hub name, for whoever loads it.
    """
    config = copy.deepcopy(peft_config)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    # Weights first: a folder with a config is whole.
    write_atomically(folder / WEIGHTS_FILE, tensors_to_bytes(state, {"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, json.dumps(values, indent=2, sort_keys=True).encode())


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """The tensors and the config of an adapter folder.

    Raises:
        AssetError: a file is missing or broken.
    """
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise ModelFolderError(f"{folder}: expected an adapter folder with {CONFIG_FILE}: {error}") from error
    state, _ = read_tensors(folder / WEIGHTS_FILE)
    return state, config
