"""The shapes of a low-rank adapter's tensors at another rank, by peft's names: lora_A is [R, I], lora_B is [O, R]."""

from collections.abc import Mapping
from dataclasses import replace

from protocol.safetensors_header import TensorInfo


def tensors_at_rank(tensors: Mapping[str, TensorInfo], rank: int) -> dict[str, TensorInfo]:
    """The tensors that the adapter has at `rank`; what is no factor of a product stays as it is."""
    resized = dict(tensors)
    for name, info in tensors.items():
        if ".lora_A." in name:
            resized[name] = replace(info, shape=(rank, *info.shape[1:]))
        elif ".lora_B." in name:
            resized[name] = replace(info, shape=(info.shape[0], rank, *info.shape[2:]))
    return resized
