"""Sets of class ids in few bits: the Elias-Fano code, for many rows at once.

K ids out of C in ascending order: of each the low `l = floor(log2(C / K))` bits as they are, and the rest in unary: bit
`(id_j >> l) + j` of a row's bitmap is set for the j-th id (P. Elias, 1974; R. Fano, 1971). That is at most
`log2(C / K) + 2` bits an id, where no code can do with less than about 1.4 instead of 2. 32 ids of 32,000 classes take
48 bytes instead of 64, of 151,936 classes 57 instead of 128.

Names: S rows, K ids a row, W bytes a row, b bits of an integer.
"""

import torch
from torch import Tensor


def packed_width(k: int, num_classes: int) -> int:
    """W: bytes a row."""
    return sum(_widths(k, num_classes))


def pack_ids(ids_SK: Tensor, num_classes: int) -> Tensor:
    """Pack sets of ids: low bits, then the bitmap, each in whole bytes.

    Args:
        ids_SK: integers in 0..C-1, ascending in each row.
        num_classes: C.

    Returns:
        uint8 [S, W].
    """
    rows, k = ids_SK.shape
    low_bits = _low_bits(k, num_classes)
    _, high_width = _widths(k, num_classes)
    high_S8 = torch.zeros(rows, 8 * high_width, dtype=torch.bool)
    high_S8.scatter_(1, (ids_SK >> low_bits) + torch.arange(k), True)
    return torch.cat([pack_integers(ids_SK, low_bits), pack_bits(high_S8, high_width)], 1)


def unpack_ids(packed_SW: Tensor, k: int, num_classes: int) -> Tensor:
    """The ids, int64 [S, K], ascending and distinct in each row.

    Args:
        packed_SW: uint8, as wide as `packed_width` says.
        k: K.
        num_classes: C.

    Raises:
        ValueError: a row without exactly K ids, ids that do not ascend or are not below C, or bits that belong to no
            id; `args[1]` is the row.
    """
    low_SW, high_SW = torch.split(packed_SW, _widths(k, num_classes), 1)
    high_S8 = unpack_bits(high_SW)
    counts_S = high_S8.sum(1)
    for row in (counts_S != k).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"{k} ids, got {int(counts_S[row])}", row)
    high_SK = high_S8.nonzero()[:, 1].reshape(len(high_SW), k) - torch.arange(k)
    low_bits = _low_bits(k, num_classes)
    ids_SK = (high_SK << low_bits) + unpack_integers(low_SW, k, low_bits)
    for row in (ids_SK.amax(1) >= num_classes).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"ids below {num_classes}, got {int(ids_SK[row].max())}", row)
    for row in (ids_SK[:, 1:] <= ids_SK[:, :-1]).any(1).nonzero().flatten().tolist()[:1]:
        raise ValueError("ids that ascend, got others", row)
    return ids_SK


def pack_integers(values_SK: Tensor, bits: int) -> Tensor:
    """The low `bits` bits of each integer, one after the other, the least first: uint8 [S, ceil(K * bits / 8)]."""
    rows, k = values_SK.shape
    bits_SKb = (values_SK[:, :, None] >> torch.arange(bits)) & 1
    return pack_bits(bits_SKb.reshape(rows, k * bits).bool(), -(-k * bits // 8))


def unpack_integers(packed_SW: Tensor, k: int, bits: int) -> Tensor:
    """The integers of at most 31 bits, int64 [S, K].

    Raises:
        ValueError: bits after the last integer; `args[1]` is the row.
    """
    bits_S8 = unpack_bits(packed_SW)
    for row in bits_S8[:, k * bits :].any(1).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"zeros after {k} integers of {bits} bits, got ones", row)
    bits_SKb = bits_S8[:, : k * bits].reshape(len(packed_SW), k, bits).int()
    return (bits_SKb << torch.arange(bits, dtype=torch.int32)).sum(2)


def pack_bits(bits_SN: Tensor, width: int) -> Tensor:
    """Booleans [S, N] as uint8 [S, width], the first in the least bit; the rest zero."""
    padded_S8 = torch.nn.functional.pad(bits_SN.to(torch.uint8), (0, 8 * width - bits_SN.shape[1]))
    shifted_SW8 = padded_S8.reshape(len(bits_SN), width, 8) << torch.arange(8, dtype=torch.uint8)
    return shifted_SW8.sum(2, dtype=torch.uint8)


def unpack_bits(bytes_SW: Tensor) -> Tensor:
    """Booleans [S, 8 W] of uint8 [S, W]."""
    bits_SW8 = (bytes_SW[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits_SW8.reshape(len(bytes_SW), 8 * bytes_SW.shape[1]).bool()


def _widths(k: int, num_classes: int) -> list[int]:
    """Bytes a row of the low bits and of the bitmap."""
    low_bits = _low_bits(k, num_classes)
    return [-(-k * low_bits // 8), -(-(k + ((num_classes - 1) >> low_bits)) // 8)]


def _low_bits(k: int, num_classes: int) -> int:
    return max(0, (num_classes // max(k, 1)).bit_length() - 1)
