"""Log-probabilities in few bits: how far each lies below its row's greatest, on a scale of the row's own.

The greatest itself need not travel: a receiver rescales the K probabilities to what the tail leaves. What lies deeper
than 20 nats (less than 2.1e-9 of the greatest's probability) is raised to that. With r the row's range, the difference
of its greatest and its least, at most 20 nats, and R its scale, the least of 20 / 2^(j/32), j = 0..255, that is not
below r (so at most 1.022 r, or 0.08):

- `int7`, `int8`: R is cut into 127 or 255 even steps. A value errs by at most half a step; after rescaling, a
  log-probability given that the class is one of the K errs by at most a step, R / 127 or R / 255, and 2e-5: at most
  0.16 or 0.08 nats.
- `float16`: a value d nats down errs by at most d / 2048; after rescaling by at most r / 1024 + 2e-5, so 0.02 nats. The
  greatest ones, which carry the mass, are next to exact.

Names: S rows, K values a row, W entries a row.
"""

from typing import Literal

import torch
from torch import Tensor

from cotuning.packed_ids import pack_integers, unpack_integers

Values = Literal["int7", "int8", "float16"]
_BITS = {"int7": 7, "int8": 8}
_DEPTH_NATS = 20.0
_SCALES_AN_OCTAVE = 32


def values_layout(k: int, values: Values) -> tuple[torch.dtype, int]:
    """How `pack_values` writes a row: dtype and W."""
    if values == "float16":
        return torch.float16, k
    return torch.uint8, 1 + -(-k * _BITS[values] // 8)


def pack_values(log_probs_SK: Tensor, values: Values) -> Tensor:
    """Write log-probabilities, float32, as `values_layout` says: integers after a byte j for the scale, or float16."""
    down_SK = (log_probs_SK.amax(1, keepdim=True) - log_probs_SK).clamp(0, _DEPTH_NATS)
    if values == "float16":
        return down_SK.half()
    # A little less than the logarithm says, so that rounding never makes the scale smaller than the range.
    ranges_S1 = down_SK.amax(1, keepdim=True).clamp(min=1e-9) * (1 + 1e-6)
    scale_S1 = (_SCALES_AN_OCTAVE * (_DEPTH_NATS / ranges_S1).log2()).floor_().clamp_(0, 255).to(torch.uint8)
    most = 2 ** _BITS[values] - 1
    steps_SK = (down_SK / _nats(scale_S1) * most).round_().clamp_(0, most).long()
    return torch.cat([scale_S1, pack_integers(steps_SK, _BITS[values])], 1)


def unpack_values(packed_SW: Tensor, k: int, values: Values) -> Tensor:
    """How many nats each value lies below the greatest of its row, float32 [S, K].

    Args:
        packed_SW: of the dtype and width that `values_layout` says.
        k: K.
        values: how it was written.

    Raises:
        ValueError: a value out of range, or bits after the last; `args[1]` is the row.
    """
    if values == "float16":
        down_SK = packed_SW.float()
        for row, place in (~((down_SK >= 0) & (down_SK <= _DEPTH_NATS))).nonzero().tolist()[:1]:
            raise ValueError(f"a value in [0, {_DEPTH_NATS:g}], got {float(down_SK[row, place])}", row)
        return down_SK
    steps_SK = unpack_integers(packed_SW[:, 1:], k, _BITS[values])
    return _nats(packed_SW[:, :1]).mul(steps_SK.float()).div_(2 ** _BITS[values] - 1)


def _nats(scale_S1: Tensor) -> Tensor:
    octaves_S1 = scale_S1.float() / -_SCALES_AN_OCTAVE
    return octaves_S1.exp2() * _DEPTH_NATS
