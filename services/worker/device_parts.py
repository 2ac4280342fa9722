"""Reads the parts of devices' updates, one file at a time."""

from torch import Tensor

from assets.tensors import read_tensors
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
