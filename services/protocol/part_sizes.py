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

_ROW_BYTES = 20
"""Of one probe row: its digest, the number of its distributions and its loss."""

_FEATURE_BYTES = 2
"""Of one dimension of a row's features: float16."""

_LEAST_ROW_BYTES = 64
"""Of a probe row's line, whatever it holds: the names of its columns alone take as many."""

MOST_COUNTS_BYTES = _HEADER_BYTES + 8 * 2**20
"""Of a million counts."""

MOST_VOCABULARY_BYTES = 32 * 2**20
"""Of a compressed tokenizer: three times what those of 256,000 tokens take."""


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


def most_features_bytes(probe_set_bytes: int, feature_size: int) -> int:
    """No probe row has a line of fewer bytes than an empty one.

    Args:
        probe_set_bytes: size of the probe set's JSON Lines file.
        feature_size: dimensions of the common space.
    """
    return _HEADER_BYTES + probe_set_bytes // _LEAST_ROW_BYTES * feature_size * _FEATURE_BYTES
