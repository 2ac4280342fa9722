"""Where a model's weights go, and how much room there is."""

from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from assets.control_groups import PROCESS, memory_left
from assets.errors import DeviceError
from cotuning.language_model import decoder_layers

Devices = Literal["cpu", "auto"]
"""`auto`: every GPU that is there, else the CPU."""

DeviceMap = dict[str, str]
"""Module -> device, as `from_pretrained` takes it."""


def chosen_devices(devices: Devices) -> list[str]:
    """Names of the devices to use, at least one."""
    if devices == "auto" and torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu"]


def available_memory(devices: Devices, process: Path = PROCESS) -> dict[str, int]:
    """Bytes that this process can use on each device: what is free, and what it holds itself already.

    Args:
        devices: which.
        process: the process's folder in `/proc`, through which its container's limits are found.
    """
    available: dict[str, int] = {}
    for name in chosen_devices(devices):
        if name == "cpu":
            free, left = psutil.virtual_memory().available, memory_left(process)
            available[name] = (free if left is None else min(free, left)) + psutil.Process().memory_info().rss
        else:
            available[name] = torch.cuda.mem_get_info(name)[0] + torch.cuda.memory_reserved(name)
    return available


def spread_layers(config: Any, devices: list[str]) -> DeviceMap:
    """Deal a model's layers evenly over devices, in order; everything else goes on the first.

    So hidden states end on the device on which batches are and the head is; `accelerate` moves them from layer to
    layer. `memory.MemoryEstimate.kept_on_fullest_of` counts in the same way.

    Raises:
        ValueError: the architecture has no list of decoder layers.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = config.num_hidden_layers
    layers = decoder_layers(model, total)
    each = -(-total // len(devices))
    dealt = {f"{layers}.{index}": devices[index // each] for index in range(total)}
    return _rest(model, layers, devices[0]) | dealt


def _rest(model: torch.nn.Module, layers: str, device: str) -> DeviceMap:
    """Every module that is not the list of layers nor holds it."""
    found: DeviceMap = {}
    path = ""
    for part in layers.split("."):
        parent = model.get_submodule(path)
        found |= {f"{path}.{name}".strip("."): device for name, _ in parent.named_children() if name != part}
        path = f"{path}.{part}".strip(".")
    return found


def four_bit_config() -> BitsAndBytesConfig:
    """NF4 with double quantization, computed in bfloat16 (QLoRA, arXiv 2305.14314).

    Raises:
        DeviceError: bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise DeviceError(
            "expected the package bitsandbytes for 4-bit weights, found none: install it (`pip install bitsandbytes`), "
            "or load the model in bfloat16"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
