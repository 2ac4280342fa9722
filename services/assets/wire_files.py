"""Adapters, messages and devices' updates as the files that travel: one form for whoever writes them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from assets.data import examples_from_jsonl, examples_to_jsonl
from assets.errors import DataFileError, TensorFileError
from assets.tensors import read_tensors, tensors_to_bytes
from cotuning.strategies.results import DeviceResult, Message
from protocol.headers import (
    ADAPTER_FORMAT,
    MESSAGE_FORMAT,
    MESSAGE_ROWS,
    METADATA_BASE,
    METADATA_FORMAT,
    METADATA_MESSAGE_FORMAT,
    METADATA_MESSAGE_KIND,
    METADATA_PROBE_SET,
    METADATA_PROXY,
)
from protocol.statuses import PartKind
from protocol.strategies import StrategySpec


def adapter_file(state: Mapping[str, Tensor], *, model_sha256: str | None) -> bytes:
    """theta or omega as a file; equal values give the same bytes.

    Args:
        state: the adapter.
        model_sha256: the manifest of the run's shared small model, which the file names; None where it has none.
    """
    model = {} if model_sha256 is None else {METADATA_PROXY: model_sha256}
    return tensors_to_bytes(state, {METADATA_FORMAT: ADAPTER_FORMAT} | model)


def message_file(message: Message, kind: str) -> bytes:
    """A message as one file; equal messages give the same bytes.

    Args:
        message: of a device or of the server.
        kind: its `MessageKind`.

    Raises:
        ValueError: a tensor has the name under which rows travel.
    """
    if MESSAGE_ROWS in message.tensors:
        raise ValueError(f"expected no tensor {MESSAGE_ROWS!r} in a message: its rows travel under this name")
    tensors = dict(message.tensors)
    if message.rows:
        tensors[MESSAGE_ROWS] = torch.frombuffer(bytearray(examples_to_jsonl(message.rows)), dtype=torch.uint8)
    header = {METADATA_MESSAGE_FORMAT: MESSAGE_FORMAT, METADATA_MESSAGE_KIND: kind}
    return tensors_to_bytes(tensors, message.metadata | header)


def read_message(path: Path, kind: str) -> Message:
    """What `message_file` wrote.

    Args:
        path: of the file.
        kind: that is expected.

    Raises:
        TensorFileError: it is no message, or one of another kind.
    """
    tensors, metadata = read_tensors(path)
    for key, expected in ((METADATA_MESSAGE_FORMAT, MESSAGE_FORMAT), (METADATA_MESSAGE_KIND, kind)):
        received = metadata.pop(key, None)
        if received != expected:
            raise TensorFileError(f"{path}: header metadata `{key}`: expected {expected}, got {received or 'nothing'}")
    packed = tensors.pop(MESSAGE_ROWS, None)
    if packed is None:
        return Message(tensors, metadata)
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise TensorFileError(f"{path}: expected rows as a vector of bytes, got {packed.dtype} {list(packed.shape)}")
    try:
        return Message(tensors, metadata, examples_from_jsonl(packed.numpy().tobytes()))
    except DataFileError as error:
        raise TensorFileError(f"{path}: expected rows as JSON lines: {error}") from None


def update_files(
    result: DeviceResult,
    spec: StrategySpec,
    *,
    vocabulary: Callable[[], bytes],
    model_sha256: str | None,
    adapter_sha256: str | None,
    probe_set_sha256: str | None,
) -> dict[PartKind, bytes]:
    """What will leave a device: the parts that the strategy declares, and nothing else of the result.

    Each says in its header which files of the round it belongs to, a message which kind it is.

    Args:
        result: of the device's step.
        spec: of the strategy.
        vocabulary: gives the file of the tokenizer of the device's SLM; asked only where the strategy declares it.
        model_sha256: as in `adapter_file`.
        adapter_sha256: theta_t, as the device received it.
        probe_set_sha256: the rows that logits are of.

    Raises:
        ValueError: there are rows in the message: no text leaves a device.
    """
    model = {METADATA_PROXY: model_sha256} if model_sha256 else {}
    base = {METADATA_BASE: adapter_sha256} if adapter_sha256 else {}
    probe = {METADATA_PROBE_SET: probe_set_sha256} if probe_set_sha256 else {}
    parts = {
        PartKind.ADAPTER_DELTA: (result.delta, {METADATA_FORMAT: ADAPTER_FORMAT} | base | model),
        PartKind.LOGITS: (result.logits, result.logits_metadata | probe | model),
    }
    files = {kind: tensors_to_bytes(*part) for kind, part in parts.items() if kind in spec.uploads}
    if PartKind.SLM_VOCABULARY in spec.uploads:
        files[PartKind.SLM_VOCABULARY] = vocabulary()
    if spec.sent_message is not None and result.message is not None:
        if result.message.rows:
            raise ValueError(f"expected a device's message without rows, got {len(result.message.rows)}")
        files[spec.sent_message] = message_file(result.message, spec.sent_message)
    return files
