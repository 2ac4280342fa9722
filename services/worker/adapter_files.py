"""Adapters as files of the blob store: how the worker writes and reads theta, omega and the devices' deltas."""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import Tensor

from assets.tensors import read_tensors, tensors_to_bytes
from assets.wire_files import adapter_file
from cotuning.adapters import AdapterState
from persistence.blobs import BlobStore, StoredBlob
from protocol.headers import METADATA_FORMAT

_SAID = ("task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out", "bias")
_OPTIMIZER_FORMAT = "cotune-server-optimizer/1"


def put_adapter(blobs: BlobStore, state: Mapping[str, Tensor], *, proxy_sha256: str | None) -> StoredBlob:
    """Store an adapter; equal values give the same file.

    Args:
        proxy_sha256: The manifest of the run's shared small model, which the file names; None where it has none.
    """
    return blobs.put_bytes(adapter_file(state, model_sha256=proxy_sha256))


def get_adapter(blobs: BlobStore, sha256: str) -> AdapterState:
    """Read an adapter that the worker stored."""
    with blobs.local(sha256) as path:
        return read_tensors(path)[0]


def put_optimizer_state(blobs: BlobStore, state: Mapping[str, Tensor]) -> StoredBlob:
    """Store the state of the server's optimizer, for the round that starts from this one's version."""
    return blobs.put_bytes(tensors_to_bytes(state, {METADATA_FORMAT: _OPTIMIZER_FORMAT}))


def get_optimizer_state(blobs: BlobStore, sha256: str) -> AdapterState:
    """Read a state that the worker stored."""
    with blobs.local(sha256) as path:
        return read_tensors(path)[0]


def described_config(config: LoraConfig) -> dict[str, Any]:
    """Return what a peft config says in JSON's types, for inference and of no model yet: an `adapter_config.json`.

    Only what has been in peft since its first releases, so that an older one than ours reads it too.
    """
    plain: dict[str, Any] = config.to_dict()
    said = {name: plain[name] for name in _SAID}
    modules = said["target_modules"]
    return said | {
        "peft_type": "LORA",
        "target_modules": modules if isinstance(modules, str) else sorted(modules),
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
