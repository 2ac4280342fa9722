"""Named tensors as safetensors bytes. Never pickle."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from assets.errors import TensorFileError

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def tensors_to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: the same bytes for equal tensors and metadata, whatever the order of the mappings.

    Written here and not by the library, whose metadata come from a hash map in no fixed order. Layout: 8 bytes
    little-endian header length, JSON header padded with spaces to a multiple of 8, the tensors' bytes, by falling
    alignment and then by name, so that each starts at a multiple of its item size.

    Raises:
        ValueError: a tensor's dtype cannot be written.
    """
    return b"".join(tensor_file_chunks(tensors, metadata))


def tensor_file_chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The same bytes piece by piece, never more than one tensor copied at a time.

    Raises:
        ValueError: a tensor's dtype cannot be written.
    """
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {name!r}: expected a plain dtype, got {tensor.dtype}")
        offsets = [position, position + tensor.numel() * tensor.element_size()]
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for _, tensor in ordered:
        yield _raw_bytes(tensor)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, on the CPU, sorted by name.

    The file is read once, into memory of its own, and the tensors are views of it: in a file that was written here and
    holds one dtype they lie one behind the other, so that what goes through all values can take them as one vector.

    Raises:
        TensorFileError: missing, truncated, of an unknown dtype, or not a safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as library:
            metadata = dict(library.metadata() or {})
        # Not the library's `get_tensor`: it loses 60 bytes each time (safetensors 0.8), 20 MiB in a round of 1,000
        # updates; and its `load` copies everything twice. It has checked the header, whose offsets tile the data.
        with path.open("rb") as file:
            entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            data = torch.empty(path.stat().st_size - file.tell(), dtype=torch.uint8)
            if data.numel() and file.readinto(data.numpy().data) != data.numel():
                raise TensorFileError(f"{path}: expected {data.numel()} bytes of tensors, the file ends before")
    except FileNotFoundError:
        raise TensorFileError(f"{path}: expected a safetensors file, found none") from None
    except (SafetensorError, OSError) as error:
        raise TensorFileError(f"{path}: expected a safetensors file: {error}") from None
    entries.pop("__metadata__", None)
    return {name: _tensor(path, name, data, **entry) for name, entry in sorted(entries.items())}, metadata


def _tensor(path: Path, name: str, data: Tensor, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    """One tensor as a view of the file's data.

    A copy where another writer left it unaligned; and of bytes, which may stand for something wider: torch reads its
    generator's state as aligned words, and dies where it is not.
    """
    if dtype not in _DTYPES:
        raise TensorFileError(f"{path}: tensor {name!r}: expected one of {', '.join(_DTYPES)}, got {dtype}")
    start, end = data_offsets
    if start == end:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    raw = data[start:end]
    copied = start % _DTYPES[dtype].itemsize or dtype == "U8"
    return (raw.clone() if copied else raw).view(_DTYPES[dtype]).view(shape)


def _raw_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
