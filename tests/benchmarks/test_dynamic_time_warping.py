from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.dynamic_time_warping import edit_distances, warp

words = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=6)


def levenshtein(first: str, second: str) -> int:
    """By its definition."""
    if not first or not second:
        return len(first) + len(second)
    steps = (
        levenshtein(first[1:], second) + 1,
        levenshtein(first, second[1:]) + 1,
        levenshtein(first[1:], second[1:]) + (first[0] != second[0]),
    )
    return min(steps)


@settings(max_examples=60, deadline=None)
@given(words, words)
def test_the_path_is_monotone_complete_and_of_least_cost(first, second):
    distances = edit_distances(first, second)
    for row, left in enumerate(first):
        for column, right in enumerate(second):
            assert distances[row, column] == levenshtein(left, right)

    @cache
    def least(row: int, column: int) -> float:
        before = [(row - 1, column - 1), (row - 1, column), (row, column - 1)]
        reached = [least(*each) for each in before if min(each) >= 0]
        return distances[row, column] + (min(reached) if reached else 0)

    path = warp(first, second)
    assert path[0] == (0, 0)
    assert path[-1] == (len(first) - 1, len(second) - 1)
    assert all((r2 - r1, c2 - c1) in {(1, 1), (1, 0), (0, 1)} for (r1, c1), (r2, c2) in pairwise(path))
    assert sum(distances[step] for step in path) == pytest.approx(least(*path[-1]))


def test_nothing_to_warp():
    assert warp([], ["a"]) == []
