"""The alignment of FuseLLM (arXiv 2401.10491) and FedMKT (arXiv 2406.02224), as fast as numpy makes it: a peer.

Dynamic time warping over two token sequences, with the edit distance of the tokens' strings as cost. Distances are
taken once per pair of distinct strings and all pairs at a time, and each row of the dynamic program is one prefix
minimum: far from the published loops, so that the comparison is with the method and not with its Python.

Names: S and T tokens of two sequences, U and W distinct strings of each, L characters of the longest.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def warp(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """The path of least cost from the first pair of tokens to the last.

    Returns:
        (place in `first`, place in `second`), ascending; every token is in at least one.
    """
    if not first or not second:
        return []
    return _path(_costs(first, second))


def _costs(first: Sequence[str], second: Sequence[str]) -> NDArray[np.float64]:
    """Edit distance of every two tokens, [S, T]."""
    distinct = [list(dict.fromkeys(tokens)) for tokens in (first, second)]
    places = [{token: place for place, token in enumerate(tokens)} for tokens in distinct]
    index_s, index_t = ([own[token] for token in tokens] for own, tokens in zip(places, (first, second), strict=True))
    return edit_distances(*distinct)[np.ix_(index_s, index_t)]


def edit_distances(first: Sequence[str], second: Sequence[str]) -> NDArray[np.float64]:
    """Levenshtein distances of all pairs, [U, W]: the usual program, each of its cells for all pairs at once."""
    codes_ul, codes_wl = _codes(first), _codes(second)
    lengths_u = np.array([len(text) for text in first])[:, None]
    lengths_w = np.array([len(text) for text in second])[None, :]
    shape = (len(first), len(second))
    result = np.zeros(shape, dtype=np.int16)
    row = [np.full(shape, column, dtype=np.int16) for column in range(codes_wl.shape[1] + 1)]
    for line in range(codes_ul.shape[1] + 1):
        if line:
            above, row = row, [np.full(shape, line, dtype=np.int16)]
            for column in range(1, len(above)):
                differs = codes_ul[:, line - 1, None] != codes_wl[None, :, column - 1]
                step = np.minimum(above[column], row[column - 1]) + 1
                row.append(np.minimum(step, above[column - 1] + differs))
        for column, cell in enumerate(row):
            reached = (lengths_u == line) & (lengths_w == column)
            if reached.any():
                result[reached] = cell[reached]
    return result.astype(np.float64)


def _codes(texts: Sequence[str]) -> NDArray[np.int32]:
    codes = np.zeros((len(texts), max(map(len, texts), default=0)), dtype=np.int32)
    for place, text in enumerate(texts):
        codes[place, : len(text)] = [ord(character) for character in text]
    return codes


def _path(cost_st: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Accumulate costs row by row, then walk back."""
    total_st = np.empty_like(cost_st)
    total_st[0] = cost_st[0].cumsum()
    for line in range(1, len(cost_st)):
        above_t = total_st[line - 1]
        entered_t = np.minimum(above_t, np.concatenate([[np.inf], above_t[:-1]]))
        run_t = cost_st[line].cumsum()
        # D[j] = c[j] + min(entered[j], D[j-1]) = run[j] + min over k <= j of (entered[k] - run[k-1])
        total_st[line] = run_t + np.minimum.accumulate(entered_t - run_t + cost_st[line])
    line, column = cost_st.shape[0] - 1, cost_st.shape[1] - 1
    path = [(line, column)]
    while line or column:
        steps = [(line - 1, column - 1), (line - 1, column), (line, column - 1)]
        line, column = min((step for step in steps if min(step) >= 0), key=lambda step: total_st[step])
        path.append((line, column))
    return path[::-1]
