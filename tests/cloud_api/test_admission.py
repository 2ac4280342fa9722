"""The gate for a part's header: as soon as the header is whole, whatever pieces it comes in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_api.updates.admission import MOST_NAMES, HeaderGate, check_tensors
from persistence.updates import PartAdmission
from protocol.errors import DomainError, ErrorCode
from protocol.safetensors_header import TensorInfo
from protocol.statuses import PartKind
from tests.cloud_api.running_api import TENSORS, logits, safetensors

ANYTHING = PartAdmission("run", "round", None, None, None, None, None)
LOGITS = logits()


def feed(gate: HeaderGate, content: bytes, size: int) -> int:
    """Give the gate pieces of `size` bytes; return how many bytes it took before it refused, or all."""
    for start in range(0, len(content), size):
        try:
            gate.take(content[start : start + size])
        except DomainError:
            return start
    return len(content)


@given(size=st.integers(1, len(LOGITS)))
def test_a_good_file_passes_in_any_pieces(size: int) -> None:
    gate = HeaderGate(PartKind.LOGITS, ANYTHING, len(LOGITS))
    assert feed(gate, LOGITS, size) == len(LOGITS)
    gate.finish()


def test_a_wrong_file_is_refused_before_its_data_comes() -> None:
    big = {"w": TensorInfo("F32", (100_000,))}
    content = safetensors(big)
    expected = PartAdmission("run", "round", None, None, None, TENSORS, None)
    gate = HeaderGate(PartKind.ADAPTER_DELTA, expected, len(content))
    assert feed(gate, content, 64) < 500
    impossible = (2**62).to_bytes(8, "little") + b"{}"
    assert feed(HeaderGate(PartKind.LOGITS, ANYTHING, 10**9), impossible, 1) == 7


def outcome(content: bytes) -> ErrorCode | None:
    gate = HeaderGate(PartKind.LOGITS, ANYTHING, len(content))
    try:
        gate.take(content)
        gate.finish()
    except DomainError as error:
        return error.code
    return None


@given(st.binary(max_size=300))
def test_any_bytes_are_taken_or_refused_with_a_code(content: bytes) -> None:
    assert outcome(content) in {None, ErrorCode.NOT_SAFETENSORS}


def test_many_differences_are_shortened() -> None:
    received = {f"unknown.{index:03d}" + "x" * 1000: TensorInfo("F32", (1,)) for index in range(200)}
    with pytest.raises(DomainError) as caught:
        check_tensors(received, TENSORS)
    error = caught.value
    assert error.code is ErrorCode.WRONG_TENSOR_NAMES
    assert error.expected == sorted(TENSORS)
    assert len(error.received) == MOST_NAMES
    assert "and 195 more" in error.detail
    assert len(error.detail) < 2000
