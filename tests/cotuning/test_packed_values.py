"""Packed log-probabilities err by no more than they say, take the bytes they say, and nothing else is let in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotuning.packed_values import Values, pack_values, unpack_values, values_layout

STEPS = {"int7": 127, "int8": 255}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.floats(-60, 0, width=32), min_size=5, max_size=5), min_size=1, max_size=4),
    st.sampled_from(["int7", "int8", "float16"]),
    st.sampled_from([1.0, 1e-3, 0.3]),
)
def test_a_value_errs_by_half_a_step_of_its_rows_scale(rows: list[list[float]], values: Values, shrink: float) -> None:
    exact = torch.tensor(rows) * shrink
    packed = pack_values(exact, values)
    dtype, width = values_layout(5, values)
    assert (packed.dtype, tuple(packed.shape)) == (dtype, (len(rows), width))
    down = (exact.amax(1, keepdim=True) - exact).clamp(max=20)
    error = (unpack_values(packed, 5, values) - down).abs()
    if values == "float16":
        assert bool((error <= down / 2048 + 1e-7).all())
        return
    scale = torch.maximum(1.0222 * down.amax(1, keepdim=True), torch.tensor(20 / 2 ** (255 / 32))).clamp(max=20)
    assert bool((error <= scale / STEPS[values] / 2 + 1e-5).all())


def test_by_hand() -> None:
    """Ten nats are an octave below twenty: scale 32 (31 with its margin); 127 steps, of which 5 nats are about half."""
    packed = pack_values(torch.tensor([[-1.0, -11.0, -6.0]]), "int7")
    scale = 20 * 2 ** (-31 / 32)
    steps = [0, round(10 / scale * 127), round(5 / scale * 127)]
    assert steps == [0, 124, 62]
    joined = steps[0] | steps[1] << 7 | steps[2] << 14
    assert packed.tolist() == [[31, *joined.to_bytes(3, "little")]]
    assert pack_values(torch.tensor([[-1.0, -11.0, -6.0]]), "int8").tolist() == [[31, 0, 250, 125]]
    assert pack_values(torch.tensor([[-3.0, -99.0]]), "int8").tolist() == [[0, 0, 255]], "at most 20 nats"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["int7", "int8"]), st.integers(1, 9), st.data())
def test_any_bytes_are_values_in_range_or_refused(values: Values, k: int, data: st.DataObject) -> None:
    width = values_layout(k, values)[1]
    raw = data.draw(st.lists(st.integers(0, 255), min_size=width, max_size=width))
    try:
        down = unpack_values(torch.tensor([raw], dtype=torch.uint8), k, values)
    except ValueError:
        assert k * STEPS[values].bit_length() % 8, "no bits are left over"
        return
    assert down.shape == (1, k)
    assert bool(((down >= 0) & (down <= 20)).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, 21.0])
def test_what_is_no_number_of_nats_is_refused_with_its_row(value: float) -> None:
    packed = pack_values(torch.tensor([[0.0, -1.0]] * 3), "float16")
    packed[2, 1] = value
    with pytest.raises(ValueError, match=r"a value in \[0, 20\], got") as refusal:
        unpack_values(packed, 2, "float16")
    assert refusal.value.args[1] == 2
