"""What identifies a model for those that average its adapters: its weights and its tokenizer, as they are loaded.

Not the files: one model saved by two versions of a library, or in another number of shards, gives other bytes on disk
and the same model.
"""

import hashlib
from dataclasses import dataclass

import torch

from cotuning.language_model import LanguageModel


@dataclass(frozen=True)
class ModelFingerprint:
    """Two SHA-256 in hexadecimal.

    Attributes:
        weights: over the architecture and, by name, each parameter's shape and float32 values; tied ones once.
        tokenizer: `TokenTable.fingerprint`.
    """

    weights: str
    tokenizer: str


def fingerprint_model(lm: LanguageModel) -> ModelFingerprint:
    """Fingerprint a model without adapters. Reads every weight once, one tensor in memory at a time."""
    digest = hashlib.sha256(lm.architecture.encode())
    for name, tensor in sorted(lm.base.named_parameters()):
        digest.update(f"\0{name}\0{list(tensor.shape)}\0".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(values.view(-1).numpy().data)
    return ModelFingerprint(digest.hexdigest(), lm.table.fingerprint)
