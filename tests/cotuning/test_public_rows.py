"""The deal of the public rows: complete, disjoint, independent of the file's order, and refused when too small."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotuning.examples import Example
from cotuning.public_rows import TooFewRows, in_hashed_order, split_public_rows


def _rows(count: int) -> list[Example]:
    return [Example(id=str(n), instruction=f"add {n}", input=str(n), output=str(n + 1)) for n in range(count)]


def _texts(rows: list[Example]) -> list[tuple[str, str, str]]:
    return [(row.instruction, row.input, row.output) for row in rows]


@given(st.integers(0, 2**31 - 1), st.randoms(use_true_random=False))
def test_parts_are_disjoint_complete_and_independent_of_the_order(seed: int, order: random.Random) -> None:
    rows = _rows(40)
    dealt = split_public_rows(rows, probe_rows=7, validation_rows=11, seed=seed, source="x")
    assert (len(dealt.probe), len(dealt.validation), len(dealt.training)) == (7, 11, 22)
    together = _texts(dealt.probe) + _texts(dealt.validation) + _texts(dealt.training)
    assert sorted(together) == sorted(_texts(rows))
    order.shuffle(rows)
    assert split_public_rows(rows, probe_rows=7, validation_rows=11, seed=seed, source="x") == dealt


def test_seeds_deal_differently_and_repeated_rows_are_one() -> None:
    rows = _rows(40)
    assert _texts(in_hashed_order(rows, 1)) != _texts(in_hashed_order(rows, 2))
    assert in_hashed_order(rows + rows, 1) == in_hashed_order(rows, 1)


def test_text_moved_between_fields_is_another_row() -> None:
    one = Example(id="1", instruction="a", input="bc", output="d")
    other = Example(id="2", instruction="ab", input="c", output="d")
    assert len(in_hashed_order([one, other], 0)) == 2


def test_too_few_rows_are_refused_with_what_was_expected() -> None:
    with pytest.raises(TooFewRows, match=r"/data/public\.jsonl") as caught:
        split_public_rows(_rows(18), probe_rows=7, validation_rows=11, seed=0, source="/data/public.jsonl")
    assert (caught.value.expected, caught.value.received) == (19, 18)
