"""Edit distances of many byte strings at once, and the nearest piece of a vocabulary (MinED).

Names: N and M strings of two lists, L bytes of the longest of the second, V token ids.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotuning.token_tables import TokenTable

_NO_BYTE = -1
"""Fills strings up to the longest; equals no byte."""


def edit_distances(strings_a: Sequence[bytes], strings_b: Sequence[bytes]) -> NDArray[np.int32]:
    """Levenshtein distances (insertions, deletions, substitutions of bytes, each at cost 1) of all pairs, [N, M].

    The table of Wagner and Fischer (1974), one row for all pairs at a time: within a row an insertion chain is a
    running minimum, so there is no loop over pairs or columns. Memory is N x M x L of 4 bytes.
    """
    lengths_N = np.array([len(one) for one in strings_a], dtype=np.int64)
    lengths_M = np.array([len(one) for one in strings_b], dtype=np.int64)
    bytes_NK, bytes_ML = _table(strings_a, lengths_N), _table(strings_b, lengths_M)
    width = bytes_ML.shape[1]
    columns_L = np.arange(width + 1, dtype=np.int32)
    row_NML = np.broadcast_to(columns_L, (len(strings_a), len(strings_b), width + 1)).copy()
    distances_NM = np.broadcast_to(lengths_M, (len(strings_a), len(strings_b))).astype(np.int32)
    columns_M = np.arange(len(strings_b))
    for step in range(bytes_NK.shape[1]):
        different_NML = bytes_NK[:, step, None, None] != bytes_ML[None]
        next_NML = row_NML + 1  # a deletion
        np.minimum(next_NML[..., 1:], row_NML[..., :-1] + different_NML, out=next_NML[..., 1:])
        row_NML = np.minimum.accumulate(next_NML - columns_L, axis=-1) + columns_L
        ended_N = np.flatnonzero(lengths_N == step + 1)
        distances_NM[ended_N] = row_NML[ended_N[:, None], columns_M, lengths_M]
    return distances_NM


def _table(strings: Sequence[bytes], lengths_N: NDArray[np.int64]) -> NDArray[np.int16]:
    """The strings as rows of byte values, filled up to the longest."""
    table_NL = np.full((len(strings), int(lengths_N.max(initial=0))), _NO_BYTE, dtype=np.int16)
    for row, string in enumerate(strings):
        table_NL[row, : len(string)] = np.frombuffer(string, dtype=np.uint8)
    return table_NL


@lru_cache(maxsize=32)
def _found(source: str, target: str) -> dict[int, int]:
    """What was found in this process from one vocabulary to another, by their fingerprints: a search takes long."""
    return {}


class NearestPieces:
    """For ids of one vocabulary, the ids of another with the least edit distance, found once each (MinED).

    FuseLLM (arXiv 2401.10491) and FedMKT (arXiv 2406.02224) compare vocabulary strings; here
    it is pieces' bytes. Of several nearest pieces the one with the least id is taken. END goes to END, other specials
    to nothing.

    Args:
        source: whose ids are asked for.
        target: whose ids are given.
    """

    def __init__(self, source: TokenTable, target: TokenTable) -> None:
        self._source = source
        self._equal = {piece: index for index, piece in reversed(list(enumerate(target.pieces))) if piece}
        self._ids = np.array(sorted(self._equal.values()), dtype=np.int64)
        self._pieces = [target.pieces[index] or b"" for index in self._ids.tolist()]
        self._lengths = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        self._counts = np.zeros((256, len(self._pieces)), dtype=np.uint16)
        for place, piece in enumerate(self._pieces):
            for byte in piece:
                self._counts[byte, place] += 1
        self._known = _found(source.fingerprint, target.fingerprint)
        self._known[source.end_id] = target.end_id

    def __call__(self, ids: Tensor) -> Tensor:
        """The nearest ids, of the same shape; -1 where there is none."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        nearest = [self._nearest(index) for index in unique.tolist()]
        return torch.tensor(nearest, dtype=torch.int64, device=ids.device)[inverse]

    def _nearest(self, index: int) -> int:
        if index not in self._known:
            self._known[index] = self._search(self._source.pieces[index])
        return self._known[index]

    def _search(self, piece: bytes | None) -> int:
        if not piece or not self._pieces:
            return -1
        if piece in self._equal:
            return self._equal[piece]
        # Strings of n and m bytes that share s of them, counted with repeats, are at least max(n, m) - s edits apart.
        shared = np.zeros(len(self._pieces), dtype=np.int64)
        for byte, count in Counter(piece).items():
            shared += np.minimum(self._counts[byte], count)
        bounds = np.maximum(self._lengths, len(piece)) - shared
        least, nearest = len(piece) + int(self._lengths.max()), -1
        for bound in np.unique(bounds).tolist():
            if bound > least:
                break
            candidates = np.flatnonzero(bounds == bound)
            distances = edit_distances([piece], [self._pieces[place] for place in candidates.tolist()])[0]
            found, index = int(distances.min()), int(self._ids[candidates[int(distances.argmin())]])
            if found < least or (found == least and index < nearest):
                least, nearest = found, index
        return nearest
