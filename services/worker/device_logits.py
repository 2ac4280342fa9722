"""Reads the devices' probe logits, one file at a time, against what the round asked for."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from assets.tensors import read_tensors
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.payload import PayloadRows
from cotuning.probe_logits import ProbePlaces
from cotuning.strategies import co_plms
from persistence.blobs import BlobStore
from persistence.updates import UpdateRecord
from protocol.statuses import PartKind
from protocol.strategies import CoPlmsSettings


def read_part(blobs: BlobStore, update: UpdateRecord, kind: PartKind) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a part of an update.

    Raises:
        TensorFileError: not a safetensors file.
        DomainError: ARTIFACT_NOT_FOUND; the store has lost it, which is not the device's fault.
    """
    with blobs.local(update.parts[kind]) as path:
        return read_tensors(path)


@dataclass(frozen=True)
class LogitsReader:
    """What every device's logits of a round must agree with."""

    blobs: BlobStore
    proxy: LanguageModel
    probe: list[Example]
    settings: CoPlmsSettings

    @cached_property
    def _places(self) -> ProbePlaces:
        return co_plms.logits_places(self.proxy, self.probe, self.settings)

    def read(self, update: UpdateRecord) -> PayloadRows:
        """Read and check a device's logits.

        Raises:
            PayloadError: they do not belong to this proxy and probe set, or hold impossible values.
            TensorFileError: not a safetensors file.
            DomainError: ARTIFACT_NOT_FOUND, see `read_part`.
        """
        tensors, metadata = read_part(self.blobs, update, PartKind.LOGITS)
        return co_plms.parse_logits(
            tensors,
            metadata,
            proxy=self.proxy,
            probe=self.probe,
            places=self._places,
            settings=self.settings,
        )
