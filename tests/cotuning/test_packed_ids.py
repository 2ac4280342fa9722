"""Packed ids come back as they went, in the bytes that the code promises, and nothing else is let in."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotuning.packed_ids import (
    pack_bits,
    pack_ids,
    pack_integers,
    packed_width,
    unpack_bits,
    unpack_ids,
    unpack_integers,
)


@st.composite
def id_sets(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    classes = draw(st.integers(1, 200_000))
    k = draw(st.integers(1, min(classes, 40)))
    one_row = st.lists(st.integers(0, classes - 1), min_size=k, max_size=k, unique=True).map(sorted)
    return draw(st.lists(one_row, min_size=1, max_size=4)), classes


@settings(max_examples=150, deadline=None)
@given(id_sets())
def test_ids_come_back_from_few_bits(sets: tuple[list[list[int]], int]) -> None:
    rows, classes = sets
    k = len(rows[0])
    packed = pack_ids(torch.tensor(rows), classes)
    assert packed.shape[1] == packed_width(k, classes)
    assert unpack_ids(packed, k, classes).tolist() == rows
    assert 8 * packed.shape[1] <= k * (math.log2(classes / k) + 2) + 16


def test_by_hand() -> None:
    """2 of 8 classes: two low bits each; 5 = 1.01 and 6 = 1.10, so low 01 10 and high bits 1 + 0 and 1 + 1."""
    assert pack_ids(torch.tensor([[5, 6]]), 8).tolist() == [[0b1001, 0b110]]


def test_every_class_and_no_rows() -> None:
    everything = torch.arange(7)[None]
    assert unpack_ids(pack_ids(everything, 7), 7, 7).tolist() == everything.tolist()
    nothing = torch.zeros(0, 4, dtype=torch.int64)
    assert unpack_ids(pack_ids(nothing, 50), 4, 50).shape == (0, 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(bits: list[bool]) -> None:
    width = -(-len(bits) // 8)
    packed = pack_bits(torch.tensor([bits], dtype=torch.bool).reshape(1, -1), width)
    assert unpack_bits(packed)[0, : len(bits)].tolist() == bits
    assert int(unpack_bits(packed).sum()) == sum(bits)


def test_what_no_set_of_ids_packs_to_is_refused_with_its_row() -> None:
    packed = pack_ids(torch.tensor([[1, 9, 20, 49]] * 2), 50)
    more = packed.clone()
    more[1, -1] ^= 1 << 7
    with pytest.raises(ValueError, match=r"4 ids, got [35]") as refusal:
        unpack_ids(more, 4, 50)
    assert refusal.value.args[1] == 1
    beyond = pack_ids(torch.tensor([[1, 9, 20, 50]]), 51)
    with pytest.raises(ValueError, match="ids below 50, got 50"):
        unpack_ids(beyond, 4, 50)
    with pytest.raises(ValueError, match="ids that ascend"):
        unpack_ids(pack_ids(torch.tensor([[9, 9, 20, 49]]), 50), 4, 50)
    few = pack_ids(torch.tensor([[1, 2, 3]] * 3), 20)  # three times two low bits
    few[2, 0] |= 1 << 6
    with pytest.raises(ValueError, match="zeros after 3 integers of 2 bits, got ones") as refusal:
        unpack_ids(few, 3, 20)
    assert refusal.value.args[1] == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 12), st.integers(0, 9), st.integers(0, 3), st.randoms())
def test_integers_come_back(bits: int, k: int, rows: int, draw: random.Random) -> None:
    values = [[draw.randrange(2**bits) for _ in range(k)] for _ in range(rows)]
    packed = pack_integers(torch.tensor(values, dtype=torch.int64).reshape(rows, k), bits)
    assert packed.shape == (rows, -(-k * bits // 8))
    assert unpack_integers(packed, k, bits).tolist() == values


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(1, 300), st.data())
def test_any_bytes_are_a_set_or_refused(k: int, classes: int, data: st.DataObject) -> None:
    k = min(k, classes)
    width = packed_width(k, classes)
    raw = data.draw(st.lists(st.integers(0, 255), min_size=width, max_size=width))
    packed = torch.tensor([raw], dtype=torch.uint8)
    try:
        ids = unpack_ids(packed, k, classes)[0].tolist()
    except ValueError:
        return
    assert torch.equal(pack_ids(torch.tensor([ids]), classes), packed), "one set has one packing"
    assert ids == sorted(set(ids))
    assert len(ids) == k
    assert ids[-1] < classes
