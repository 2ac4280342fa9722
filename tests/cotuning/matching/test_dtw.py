"""Dynamic time warping against the cell-by-cell table and by hand."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cotuning.matching.dtw import dtw_align
from tests.cotuning.matching.test_edit_distance import slow_distance

tokens = st.lists(st.text("abc ", max_size=4).map(str.encode), min_size=1, max_size=7)


def slow_total(a: list[bytes], b: list[bytes]) -> int:
    """The least total cost of a path, cell by cell."""
    best: dict[tuple[int, int], int] = {}
    for i, token_a in enumerate(a):
        for j, token_b in enumerate(b):
            before = [best[cell] for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in best]
            best[i, j] = slow_distance(token_a, token_b) + min(before, default=0)
    return best[len(a) - 1, len(b) - 1]


@given(tokens, tokens)
def test_the_path_is_allowed_and_no_path_is_cheaper(a: list[bytes], b: list[bytes]) -> None:
    path = dtw_align(a, b).tolist()
    assert path[0] == [0, 0]
    assert path[-1] == [len(a) - 1, len(b) - 1]
    assert all((x[0] - w[0], x[1] - w[1]) in {(1, 1), (1, 0), (0, 1)} for w, x in pairwise(path))
    assert sum(slow_distance(a[i], b[j]) for i, j in path) == slow_total(a, b)


@given(tokens)
def test_equal_sequences_are_paired_one_to_one(a: list[bytes]) -> None:
    assert dtw_align(a, a).tolist() == [[i, i] for i in range(len(a))]


def test_a_hand_worked_case() -> None:
    """Pairing "it" with " inter" costs 4 and spares the 8 of " international" with " inter": what DTW gets wrong."""
    a = [b"un", b"it", b" international"]
    b = [b"un", b"it", b" inter", b"national"]
    assert dtw_align(a, b).tolist() == [[0, 0], [1, 1], [1, 2], [2, 3]]
    assert dtw_align([b"abcd", b"x"], [b"ab", b"cd", b"x"]).tolist() == [[0, 0], [0, 1], [1, 2]]


def test_a_side_without_tokens_has_no_path() -> None:
    assert dtw_align([], [b"a"]).shape == (0, 2)
    assert dtw_align([b"a"], []).dtype == np.int64
