"""Admits a part by its safetensors header: what can be known without its values. Those are the worker's to check.

The header comes first in the file, so that a wrong update is refused before the rest of it is read.
"""

import io
from collections.abc import Mapping
from typing import Any

from persistence.updates import PartAdmission
from protocol.errors import DomainError, ErrorCode
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
    VOCABULARY_FORMAT,
)
from protocol.safetensors_header import MAX_HEADER_BYTES, HeaderError, SafetensorsHeader, TensorInfo, read_header
from protocol.statuses import PartKind

MOST_NAMES = 5
"""So many differences are listed; the rest is counted."""

_LENGTH_BYTES = 8


class HeaderGate:
    """Watches a file's bytes pass, and refuses it as soon as its header is whole and wrong.

    Args:
        size_bytes: of the file.
    """

    def __init__(self, kind: PartKind, admission: PartAdmission, size_bytes: int) -> None:
        self._kind = kind
        self._admission = admission
        self._size_bytes = size_bytes
        self._head = bytearray()
        self._open = False

    def take(self, block: bytes) -> None:
        """Look at the next bytes. Raises as `finish`."""
        if self._open:
            return
        self._head += block
        if len(self._head) >= _LENGTH_BYTES:
            length = int.from_bytes(self._head[:_LENGTH_BYTES], "little")
            impossible = length > MAX_HEADER_BYTES or _LENGTH_BYTES + length > self._size_bytes
            if impossible or len(self._head) >= _LENGTH_BYTES + length:
                self.finish()

    @property
    def passed(self) -> bool:
        """Whether the header was whole, and right."""
        return self._open

    def finish(self) -> None:
        """Check the header, if that has not been done.

        Raises:
            DomainError: NOT_SAFETENSORS, WRONG_BASE_VERSION, WRONG_TENSOR_NAMES, WRONG_TENSOR_DTYPE,
                WRONG_TENSOR_SHAPE, LOGITS_MISMATCH or MESSAGE_MISMATCH.
        """
        if self._open:
            return
        try:
            header = read_header(io.BytesIO(self._head), self._size_bytes)
        except HeaderError as error:
            raise DomainError(ErrorCode.NOT_SAFETENSORS, f"not a safetensors file: {error}") from None
        admit(self._kind, self._admission, header)
        self._open = True
        self._head.clear()


def admit(kind: PartKind, admission: PartAdmission, header: SafetensorsHeader) -> None:
    """Compare a header with what the round expects. Raises as `HeaderGate.finish`."""
    metadata = header.metadata
    match kind:
        case PartKind.ADAPTER_DELTA:
            _check_metadata(metadata, METADATA_FORMAT, ADAPTER_FORMAT, ErrorCode.WRONG_BASE_VERSION)
            _check_metadata(metadata, METADATA_BASE, admission.base_sha256, ErrorCode.WRONG_BASE_VERSION)
            _check_metadata(metadata, METADATA_PROXY, admission.proxy_manifest_sha256, ErrorCode.WRONG_BASE_VERSION)
            if admission.expected_tensors is not None:
                check_tensors(header.tensors, admission.expected_tensors, adapter_rank=admission.adapter_rank)
        case PartKind.LOGITS:
            # The rest of a logits file's header belongs to the method; the worker reads it.
            for key, expected in (
                (METADATA_PROXY, admission.proxy_manifest_sha256),
                (METADATA_PROBE_SET, admission.probe_set_sha256),
            ):
                if key in metadata:
                    _check_metadata(metadata, key, expected, ErrorCode.LOGITS_MISMATCH)
        case PartKind.SLM_LOGITS | PartKind.SLM_FEATURES | PartKind.COUNTS:
            _check_metadata(metadata, METADATA_MESSAGE_FORMAT, MESSAGE_FORMAT, ErrorCode.MESSAGE_MISMATCH)
            _check_metadata(metadata, METADATA_MESSAGE_KIND, kind.value, ErrorCode.MESSAGE_MISMATCH)
            if MESSAGE_ROWS in header.tensors:
                detail = "a device's message has no rows: no text leaves a device"
                raise DomainError(ErrorCode.MESSAGE_MISMATCH, detail, received=MESSAGE_ROWS)
        case PartKind.SLM_VOCABULARY:
            _check_metadata(metadata, METADATA_FORMAT, VOCABULARY_FORMAT, ErrorCode.MESSAGE_MISMATCH)


def _check_metadata(metadata: Mapping[str, str], key: str, expected: str | None, code: ErrorCode) -> None:
    received = metadata.get(key)
    if expected is not None and received != expected:
        shown = None if received is None else received[:80]
        detail = f"header metadata `{key}`: expected {expected}, got {shown if received is not None else 'nothing'}"
        raise DomainError(code, detail, expected=expected, received=shown)


def check_tensors(
    received: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], *, adapter_rank: int | None = None
) -> None:
    """See that a delta has the adapter's tensors and no others.

    Args:
        adapter_rank: that the assignment names, for the message.

    Raises:
        DomainError: WRONG_TENSOR_NAMES, WRONG_TENSOR_DTYPE or WRONG_TENSOR_SHAPE, with the first few differences.
    """
    missing, unknown = sorted(expected.keys() - received.keys()), sorted(received.keys() - expected.keys())
    if missing or unknown:
        detail = f"missing tensors: {_listed(missing)}; unknown tensors: {_listed(unknown)}"
        raise _wrong(ErrorCode.WRONG_TENSOR_NAMES, detail, missing, [name[:200] for name in unknown])
    for code, what in ((ErrorCode.WRONG_TENSOR_DTYPE, "dtype"), (ErrorCode.WRONG_TENSOR_SHAPE, "shape")):
        wrong = [name for name in sorted(expected) if getattr(received[name], what) != getattr(expected[name], what)]
        if wrong:
            wanted = [f"{name}: {_shown(getattr(expected[name], what))}" for name in wrong]
            came = [f"{name}: {_shown(getattr(received[name], what))}" for name in wrong]
            at_rank = f" at this assignment's adapter_rank {adapter_rank}" if adapter_rank is not None else ""
            detail = f"tensors with another {what}{at_rank}: expected {_listed(wanted)}; got {_listed(came)}"
            raise _wrong(code, detail, wanted, came)


def _wrong(code: ErrorCode, detail: str, expected: list[str], received: list[str]) -> DomainError:
    return DomainError(code, detail, expected=expected[:MOST_NAMES], received=received[:MOST_NAMES])


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - MOST_NAMES} more" if len(items) > MOST_NAMES else ""
    return ", ".join(item[:200] for item in items[:MOST_NAMES]) + more if items else "none"


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
