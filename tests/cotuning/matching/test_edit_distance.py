"""Edit distances and the nearest pieces against the textbook table, one pair at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotuning.matching.edit_distance import NearestPieces, edit_distances
from tests.cotuning.trained_tokenizers import table_of

strings = st.lists(st.binary(max_size=6), min_size=1, max_size=4)
alike = st.lists(st.text("ab", max_size=7).map(str.encode), min_size=1, max_size=4)


def slow_distance(a: bytes, b: bytes) -> int:
    """Wagner and Fischer (1974), cell by cell."""
    row = list(range(len(b) + 1))
    for i, byte_a in enumerate(a):
        above, row = row, [i + 1]
        for j, byte_b in enumerate(b):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (byte_a != byte_b)))
    return row[-1]


@given(st.one_of(strings, alike), st.one_of(strings, alike))
def test_all_pairs_equal_the_textbook_table(a: list[bytes], b: list[bytes]) -> None:
    assert edit_distances(a, b).tolist() == [[slow_distance(one, other) for other in b] for one in a]


@pytest.mark.parametrize(("a", "b", "distance"), [(b"kitten", b"sitting", 3), (b"", b"abc", 3), (b"abc", b"", 3)])
def test_worked_cases(a: bytes, b: bytes, distance: int) -> None:
    assert edit_distances([a], [b]).tolist() == [[distance]]


def test_no_strings_give_no_distances() -> None:
    assert edit_distances([], [b"a"]).shape == (0, 1)
    assert edit_distances([b"a"], []).shape == (1, 0)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_the_nearest_piece_is_the_least_id_at_the_least_distance(data: st.DataObject) -> None:
    source, target = table_of("byte_level"), table_of("byte_fallback")
    ids = data.draw(st.lists(st.integers(0, source.num_tokens - 1), min_size=1, max_size=3))
    nearest = NearestPieces(source, target)(torch.tensor([ids]))
    assert nearest.shape == (1, len(ids))
    for index, found in zip(ids, nearest[0].tolist(), strict=True):
        piece = source.pieces[index]
        if piece is None:
            assert found == (target.end_id if index == source.end_id else -1)
            continue
        distances = [slow_distance(piece, other) if other else 10**6 for other in target.pieces]
        assert found == distances.index(min(distances))


def test_equal_pieces_are_nearest_and_specials_have_none() -> None:
    table = table_of("byte_level")
    ids = torch.arange(table.num_tokens)
    expected = [index if piece is not None or index == table.end_id else -1 for index, piece in enumerate(table.pieces)]
    assert NearestPieces(table, table)(ids).tolist() == expected
