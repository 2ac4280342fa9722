"""Sets of class ids in few bits: the Elias-Fano code, for many rows at once.

K ids out of C in ascending order: of each the low `l = floor(log2(C / K))` bits as they are, and the rest in unary: bit
`(id_j >> l) + j` of a row's bitmap is set for the j-th id (P. Elias, 1974; R. Fano, 1971). That is at most
`log2(C / K) + 2` bits an id, where no code can do with less than about 1.4 instead of 2. 32 ids of 32,000 classes take
48 bytes instead of 64, of 151,936 classes 57 instead of 128.

Names: S rows, K ids a row, W bytes a row.
"""

import torch
from torch import Tensor


def packed_widths(k: int, num_classes: int) -> tuple[int, int]:
    """Bytes a row of the low and of the high part."""
    low_bits = _low_bits(k, num_classes)
    return -(-k * low_bits // 8), -(-(k + ((num_classes - 1) >> low_bits)) // 8)


def pack_ids(ids_SK: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The low and the high part, uint8 [S, W] each of `packed_widths`.

    Args:
        ids_SK: integers in 0..C-1, ascending in each row.
        num_classes: C.
    """
    rows, k = ids_SK.shape
    low_bits = _low_bits(k, num_classes)
    low_width, high_width = packed_widths(k, num_classes)
    low_SKl = (ids_SK[:, :, None] >> torch.arange(low_bits)) & 1
    high_S8 = torch.zeros(rows, 8 * high_width, dtype=torch.bool)
    high_S8.scatter_(1, (ids_SK >> low_bits) + torch.arange(k), True)
    return pack_bits(low_SKl.reshape(rows, k * low_bits).bool(), low_width), pack_bits(high_S8, high_width)


def unpack_ids(low_SW: Tensor, high_SW: Tensor, k: int, num_classes: int) -> Tensor:
    """The ids, int64 [S, K], ascending and distinct in each row.

    Args:
        low_SW, high_SW: uint8, as wide as `packed_widths` says.
        k: K.
        num_classes: C.

    Raises:
        ValueError: a row without exactly K ids, or ids that do not ascend or are not below C; `args[1]` is the row.
    """
    rows, low_bits = len(high_SW), _low_bits(k, num_classes)
    high_S8 = unpack_bits(high_SW)
    counts_S = high_S8.sum(1)
    for row in (counts_S != k).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"{k} ids, got {int(counts_S[row])}", row)
    high_SK = high_S8.nonzero()[:, 1].reshape(rows, k) - torch.arange(k)
    low_SKl = unpack_bits(low_SW)[:, : k * low_bits].reshape(rows, k, low_bits).long()
    ids_SK = (high_SK << low_bits) + (low_SKl << torch.arange(low_bits)).sum(2)
    for row in (ids_SK.amax(1) >= num_classes).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"ids below {num_classes}, got {int(ids_SK[row].max())}", row)
    for row in (ids_SK[:, 1:] <= ids_SK[:, :-1]).any(1).nonzero().flatten().tolist()[:1]:
        raise ValueError("ids that ascend, got others", row)
    return ids_SK


def pack_bits(bits_SN: Tensor, width: int) -> Tensor:
    """Booleans [S, N] as uint8 [S, width], the first in the least bit; the rest zero."""
    padded_S8 = torch.nn.functional.pad(bits_SN.to(torch.uint8), (0, 8 * width - bits_SN.shape[1]))
    shifted_SW8 = padded_S8.reshape(len(bits_SN), width, 8) << torch.arange(8, dtype=torch.uint8)
    return shifted_SW8.sum(2, dtype=torch.uint8)


def unpack_bits(bytes_SW: Tensor) -> Tensor:
    """Booleans [S, 8 W] of uint8 [S, W]."""
    bits_SW8 = (bytes_SW[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits_SW8.reshape(len(bytes_SW), 8 * bytes_SW.shape[1]).bool()


def _low_bits(k: int, num_classes: int) -> int:
    return max(0, (num_classes // max(k, 1)).bit_length() - 1)
