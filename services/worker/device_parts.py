"""Reads the parts of devices' updates, one file at a time; logits against what the round asked for."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from assets.tensors import read_tensors
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.payload import PayloadRows
from cotuning.strategies.interface import LogitsReader, StrategySteps
from persistence.blobs import BlobStore
from persistence.updates import UpdateRecord
from protocol.statuses import PartKind


def read_part(blobs: BlobStore, update: UpdateRecord, kind: PartKind) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a part of an update.

    Raises:
        TensorFileError: not a safetensors file.
        DomainError: ARTIFACT_NOT_FOUND; the store has lost it, which is not the device's fault.
    """
    with blobs.local(update.parts[kind]) as path:
        return read_tensors(path)


@dataclass(frozen=True)
class DeviceLogits:
    """What every device's logits of a round must agree with."""

    blobs: BlobStore
    steps: StrategySteps[Any]
    shared_model: LanguageModel | None
    probe: list[Example]

    @cached_property
    def _reader(self) -> LogitsReader:
        return self.steps.logits_reader(self.shared_model, self.probe)

    def read(self, update: UpdateRecord) -> PayloadRows:
        """Read and check a device's logits.

        Raises:
            PayloadError: they do not belong to this round's model and probe set, or hold impossible values.
            TensorFileError: not a safetensors file.
            DomainError: ARTIFACT_NOT_FOUND, see `read_part`.
        """
        return self._reader(*read_part(self.blobs, update, PartKind.LOGITS))
