"""Reads and checks the header of a safetensors file without torch or the safetensors library.

Layout (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length N, N bytes of JSON, then the
tensors' bytes. The API admits an update by its header alone; values are checked by the worker. Every size is bounded
before anything is allocated.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_HEADER_BYTES = 2**20
"""More than any adapter needs: about 7,000 tensors."""

MAX_DIMENSIONS = 64
"""More than any tensor has; it bounds what multiplying the sizes costs."""

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2, "U32": 4,
    "BOOL": 1,
}  # fmt: skip


class HeaderError(ValueError):
    """The bytes are not a well-formed safetensors file; the message says what was expected and what came."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a file declares."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(stream: BinaryIO, size_bytes: int) -> SafetensorsHeader:
    """Read the header of a file of `size_bytes` bytes from `stream`, positioned at its start.

    Raises:
        HeaderError: truncated, too large, not JSON, a wrong entry, or offsets that do not tile the data exactly.
    """
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise HeaderError(f"expected at least 8 bytes, got {len(prefix)}")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or 8 + length > size_bytes:
        raise HeaderError(f"header says {length} bytes; expected at most {min(MAX_HEADER_BYTES, size_bytes - 8)}")
    raw = stream.read(length)
    if len(raw) < length:
        raise HeaderError(f"header says {length} bytes, got {len(raw)}")
    if not raw.startswith(b"{"):
        raise HeaderError(f"expected a JSON object as header, got {_short(raw)}")
    try:
        entries = json.loads(raw.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"header is not JSON in UTF-8: {error}") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_text(value) for value in metadata.values()):
        raise HeaderError("expected `__metadata__` to map strings to strings")
    return SafetensorsHeader(_tensors(entries, size_bytes - 8 - length), metadata)


def _tensors(entries: dict[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    extents: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        info, (start, end) = _entry(name, entry)
        expected = DTYPE_BYTES[info.dtype] * math.prod(info.shape)
        if end - start != expected:
            raise HeaderError(
                f"tensor {_short(name)}: {info.dtype} {list(info.shape)} needs {expected} bytes, got {end - start}"
            )
        tensors[name] = info
        extents.append((start, end, name))
    position = 0
    for start, end, name in sorted(extents):
        if start != position:
            raise HeaderError(f"tensor {_short(name)}: expected to start at byte {position}, starts at {start}")
        position = end
    if position != data_bytes:
        raise HeaderError(f"tensors cover {position} bytes, the file holds {data_bytes}")
    return tensors


def _entry(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {_short(name)}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise HeaderError(f"tensor {_short(name)}: unknown dtype {_short(dtype)}; expected one of {known}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"tensor {_short(name)}: expected a list of sizes, got {_short(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"tensor {_short(name)}: expected [start, end], got {_short(offsets)}")
    return TensorInfo(dtype, tuple(shape)), (offsets[0], offsets[1])


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; refuse names that appear twice or are no Unicode, which readers understand differently."""
    if not all(_is_text(name) for name, _ in pairs):
        raise ValueError("a name holds half of a surrogate pair")
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    """Show a value of the sender's in a message, whatever its size."""
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"
