"""Dynamic time warping (DTW) over token strings, as FuseLLM (arXiv 2401.10491) aligns two tokenizations.

A peer and a rival: quadratic in tokens, and it always finds *some* path. `alignment` is linear and finds none where
there is none.

Names: N tokens of one side, M of the other, P pairs of the path.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cotuning.matching.edit_distance import edit_distances


def dtw_align(tokens_a: Sequence[bytes], tokens_b: Sequence[bytes]) -> NDArray[np.int64]:
    """The path of least total edit distance that steps through both sequences, from first pair to last pair.

    `D[i, j] = c[i, j] + min(D[i-1, j-1], D[i-1, j], D[i, j-1])` with c the edit distance of two tokens' bytes. A row is
    one vectorised step: with S the running sum of a row's costs, `D[i, j] = S[j] + min over k <= j of (m[k] - S[k-1])`,
    m[k] the lesser of the two cells above, which is a running minimum. Costs are integers, so this is exact. Ties take
    the diagonal, then a step along A.

    Args:
        tokens_a: N byte strings.
        tokens_b: M byte strings.

    Returns:
        [P, 2]: index pairs, ascending in both; every index of both sides is in at least one. Empty if a side is.
    """
    if not (tokens_a and tokens_b):
        return np.zeros((0, 2), dtype=np.int64)
    total_NM = _accumulate(_token_costs(tokens_a, tokens_b))
    row, column = len(tokens_a) - 1, len(tokens_b) - 1
    path = [(row, column)]
    while row or column:
        if not row:
            column -= 1
        elif not column:
            row -= 1
        else:
            diagonal, up, left = total_NM[row - 1, column - 1], total_NM[row - 1, column], total_NM[row, column - 1]
            if diagonal <= min(up, left):
                row, column = row - 1, column - 1
            elif up <= left:
                row -= 1
            else:
                column -= 1
        path.append((row, column))
    return np.array(path[::-1], dtype=np.int64)


def _token_costs(tokens_a: Sequence[bytes], tokens_b: Sequence[bytes]) -> NDArray[np.int64]:
    """Edit distances [N, M], computed once for each pair of different strings."""
    unique_a, unique_b = sorted(set(tokens_a)), sorted(set(tokens_b))
    place_a = {token: place for place, token in enumerate(unique_a)}
    place_b = {token: place for place, token in enumerate(unique_b)}
    distances = edit_distances(unique_a, unique_b).astype(np.int64)
    return distances[[[place_a[token]] for token in tokens_a], [place_b[token] for token in tokens_b]]


def _accumulate(costs_NM: NDArray[np.int64]) -> NDArray[np.int64]:
    """D for all cells, row by row."""
    sums_NM = costs_NM.cumsum(axis=1)
    total_NM = np.empty_like(costs_NM)
    total_NM[0] = sums_NM[0]
    for row in range(1, len(costs_NM)):
        above_M = total_NM[row - 1]
        entry_M = above_M.copy()
        np.minimum(entry_M[1:], above_M[:-1], out=entry_M[1:])
        entry_M[1:] -= sums_NM[row, :-1]
        total_NM[row] = sums_NM[row] + np.minimum.accumulate(entry_M)
    return total_NM
