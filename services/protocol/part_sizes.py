"""The most bytes that a part of an update can have, so that nothing larger is ever received."""

from collections.abc import Mapping
from math import prod

from protocol.safetensors_header import DTYPE_BYTES, TensorInfo

_HEADER_BYTES = 64 * 2**10
_ENTRY_BYTES = 512
"""Of the header, for one tensor: its name, dtype, shape and offsets as JSON."""

_CLASS_BYTES = 6
"""Of one class of one distribution: an id of at most four bytes, a value of at most two."""

_DISTRIBUTION_BYTES = 16
"""Of one distribution beside its classes: its place, scale and tail."""

_ROW_BYTES = 16
"""Of one probe row: its digest and the number of its distributions."""


def most_delta_bytes(expected: Mapping[str, TensorInfo]) -> int:
    """A delta has the adapter's tensors and no others."""
    tensors = sum(DTYPE_BYTES[info.dtype] * prod(info.shape) for info in expected.values())
    return tensors + _HEADER_BYTES + _ENTRY_BYTES * len(expected)


def most_logits_bytes(probe_set_bytes: int, top_k: int) -> int:
    """Every distribution has a byte of the probe set's file to itself, and so has the end of every response.

    Args:
        probe_set_bytes: size of the probe set's JSON Lines file.
        top_k: classes kept of each distribution.
    """
    return _HEADER_BYTES + probe_set_bytes * (top_k * _CLASS_BYTES + _DISTRIBUTION_BYTES + _ROW_BYTES)
