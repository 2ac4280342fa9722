"""Messages, tokenizers and what a strategy's server keeps, as files of the blob store."""

from collections.abc import Mapping

import torch
from torch import Tensor

from assets.errors import TensorFileError, VocabularyError
from assets.tensors import read_tensors, tensors_to_bytes
from assets.vocabulary_files import read_vocabulary, vocabulary_file
from assets.wire_files import message_file, read_message
from cotuning.adapters import AdapterState
from cotuning.strategies.combining import MESSAGE_MISMATCH, NotCounted
from cotuning.strategies.interface import DeviceMessage
from cotuning.strategies.results import Message
from cotuning.vocabulary import Reads, Vocabulary
from persistence.blobs import BlobStore, StoredBlob
from persistence.updates import UpdateRecord
from protocol.headers import METADATA_FORMAT
from protocol.statuses import PartKind
from protocol.strategies import StrategySpec

_STATE_FORMAT = "cotune-server-state/1"


def put_message(blobs: BlobStore, message: Message | None, spec: StrategySpec) -> StoredBlob | None:
    """Store the server's message; equal messages give the same file. None where there is none.

    Raises:
        ValueError: the strategy declares none.
    """
    if message is None:
        return None
    if spec.received_message is None:
        raise ValueError(f"expected no message of the server: {spec.name} declares none in `messages_down`")
    return blobs.put_bytes(message_file(message, spec.received_message))


def get_message(blobs: BlobStore, sha256: str | None, spec: StrategySpec) -> Message | None:
    """Read a message that `put_message` stored."""
    if sha256 is None or spec.received_message is None:
        return None
    with blobs.local(sha256) as path:
        return read_message(path, spec.received_message)


def put_server_state(blobs: BlobStore, state: Mapping[str, Tensor]) -> StoredBlob | None:
    """Store what the server keeps with a version, for the rounds that start from it. None for nothing."""
    return blobs.put_bytes(tensors_to_bytes(state, {METADATA_FORMAT: _STATE_FORMAT})) if state else None


def get_server_state(blobs: BlobStore, sha256: str | None) -> AdapterState:
    """Read a state that `put_server_state` stored; nothing for None."""
    if sha256 is None:
        return {}
    with blobs.local(sha256) as path:
        return read_tensors(path)[0]


def put_vocabulary(blobs: BlobStore, reads: Reads) -> StoredBlob:
    """Store a tokenizer.

    Raises:
        VocabularyError: see `vocabulary_file`.
    """
    return blobs.put_bytes(vocabulary_file(reads))


def read_device_message(
    blobs: BlobStore,
    update: UpdateRecord,
    spec: StrategySpec,
    device: torch.device | str = "cpu",
    *,
    known: dict[str, Vocabulary] | None = None,
) -> DeviceMessage | None:
    """The message of an update, with its device's tokenizer where the strategy has devices send it.

    Args:
        blobs: the store.
        update: whose.
        spec: of the strategy.
        device: where rows that the tokenizer encodes are wanted.
        known: tokenizers that were read before, by the hash of their file; gains this one. So devices that have the
            same share it. None: nothing is kept.

    Returns:
        None: it has none.

    Raises:
        NotCounted: a file of it cannot be read.
        DomainError: ARTIFACT_NOT_FOUND; the store has lost it, which is not the device's fault.
    """
    kind = spec.sent_message
    if kind is None or kind not in update.parts:
        return None
    try:
        with blobs.local(update.parts[kind]) as path:
            message = read_message(path, kind)
        vocabulary = None
        if PartKind.SLM_VOCABULARY in spec.uploads:
            vocabulary = _vocabulary(
                blobs, update.parts[PartKind.SLM_VOCABULARY], device, {} if known is None else known
            )
    except (TensorFileError, VocabularyError) as error:
        raise NotCounted(MESSAGE_MISMATCH, str(error)) from error
    if message.rows:
        raise NotCounted(MESSAGE_MISMATCH, f"expected a device's message without rows, got {len(message.rows)}")
    return DeviceMessage(message.tensors, message.metadata, update.num_examples, vocabulary)


def _vocabulary(blobs: BlobStore, sha256: str, device: torch.device | str, known: dict[str, Vocabulary]) -> Vocabulary:
    if sha256 not in known:
        with blobs.local(sha256) as path:
            known[sha256] = read_vocabulary(path, device)
    return known[sha256]
