"""Headers of files that the safetensors library wrote, and of bytes that nobody should have written."""

import contextlib
import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from protocol.safetensors_header import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    HeaderError,
    SafetensorsHeader,
    TensorInfo,
    read_header,
)

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "BOOL": torch.bool,
}  # fmt: skip

Declared = dict[str, tuple[str, list[int]]]
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)
files = st.dictionaries(names, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), shapes), max_size=6)
metadata = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.text(max_size=20), max_size=3
)


def read(content: bytes) -> SafetensorsHeader:
    return read_header(io.BytesIO(content), len(content))


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(start: int = 0, end: int = 4, **changed: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, end], **changed}


def test_the_table_of_dtypes_is_torchs() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES


@given(files, st.none() | metadata.filter(bool))
def test_it_reads_what_the_library_writes(
    declared: dict[str, tuple[str, list[int]]], extra: dict[str, str] | None
) -> None:
    tensors = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in declared.items()}
    header = read(save(tensors, metadata=extra))
    assert header.metadata == (extra or {})
    assert header.tensors == {name: TensorInfo(dtype, tuple(shape)) for name, (dtype, shape) in declared.items()}


@given(files, st.data())
def test_a_cut_or_longer_file_is_refused(declared: Declared, data: st.DataObject) -> None:
    content = save({name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in declared.items()})
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(HeaderError):
        read(content[:cut])
    with pytest.raises(HeaderError):
        read(content + b"\x00")


def _header_length(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_give_a_header_or_a_header_error(content: bytes) -> None:
    with contextlib.suppress(HeaderError):
        read(content)


@settings(max_examples=200)
@given(st.data())
def test_a_mutated_file_is_admitted_only_if_the_library_admits_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never more generous than the library that will load the tensors."""
    content = bytearray(save({"a.lora_A": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int8)}, metadata={"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, _header_length(bytes(content)) + 7) if len(content) > 8 else st.just(0))
        content[min(place, len(content) - 1)] = data.draw(st.sampled_from([*b'0123456789{}[]":,FI-e.', 0, 255]))
    try:
        header = read(bytes(content))
    except HeaderError:
        return
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    with safe_open(path, framework="pt") as library:
        assert set(library.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            assert tuple(library.get_slice(name).get_shape()) == info.shape


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], r"expected a JSON object as header, got b'\[\]'"),
        (b" {}", "expected a JSON object as header"),
        (b"\xef\xbb\xbf{}", "expected a JSON object as header"),
        ("{}".encode("utf-16-le"), "header is not JSON"),
        (b'{"\xff": 1}', "header is not JSON in UTF-8"),
        (b'{"\\ud800": 1}', "half of a surrogate pair"),
        (b'{"__metadata__": {"a": "\\ud800"}}', "map strings to strings"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "appears twice"),
        (b'{"t": ' + b"9" * 5000 + b"}", "header is not JSON"),
        (b"{", "header is not JSON"),
        (b"\xff\xfe", "expected a JSON object as header"),
        (b'{"a":' * 100_000, "header is not JSON"),
        ({"__metadata__": {"a": 1}}, "map strings to strings"),
        ({"__metadata__": []}, "map strings to strings"),
        ({"t": []}, "expected dtype, shape and data_offsets"),
        ({"t": entry() | {"more": 1}}, "expected dtype, shape and data_offsets"),
        ({"t": {"dtype": "F32", "shape": [1]}}, "expected dtype, shape and data_offsets"),
        ({"t": entry(dtype="F31")}, "unknown dtype 'F31'"),
        ({"t": entry(dtype=["F32"])}, "unknown dtype"),
        ({"t": entry(dtype={})}, "unknown dtype"),
        ({"t": entry(shape=[-1])}, "expected a list of sizes"),
        ({"t": entry(shape=[1.0])}, "expected a list of sizes"),
        ({"t": entry(shape=[True])}, "expected a list of sizes"),
        ({"t": entry(shape="1")}, "expected a list of sizes"),
        ({"t": entry(data_offsets=[0])}, r"expected \[start, end\]"),
        ({"t": entry(data_offsets=[4, 0])}, r"expected \[start, end\]"),
        ({"t": entry(data_offsets=[0, 4, 8])}, r"expected \[start, end\]"),
        ({"t": entry(data_offsets=[0.0, 4.0])}, r"expected \[start, end\]"),
        ({"t": entry(shape=[2])}, "needs 8 bytes, got 4"),
        ({"t": entry(4, 8)}, "expected to start at byte 0, starts at 4"),
        ({"a": entry(), "b": entry()}, "expected to start at byte 4, starts at 0"),
        ({"a": entry(), "b": entry(8, 12)}, "expected to start at byte 4, starts at 8"),
        ({}, "tensors cover 0 bytes, the file holds 4"),
        ({"t": entry(shape=[2**62, 2**62])}, "bytes, got 4"),
        ({"t": entry(shape=[2**63 - 1] * 64)}, "bytes, got 4"),
        ({"t": entry(shape=[2**63])}, "expected a list of sizes"),
        ({"t": entry(shape=[10**4000] * 200)}, "expected a list of sizes"),
        ({"t": entry(shape=[1] * 65)}, "expected a list of sizes"),
        ({"t" * 10**5: entry(dtype="F" * 10**5)}, "unknown dtype"),
    ],
)
def test_what_is_wrong_is_said(header: Any, message: str) -> None:
    with pytest.raises(HeaderError, match=message) as caught:
        read(file_of(header, b"\x00" * 4))
    assert len(str(caught.value)) < 3000


def test_a_header_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        """Remembers the largest read."""

        largest = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            self.largest = max(self.largest, size)
            return super().read(size)

    for length in (MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1, 1000):
        stream = Counting(file_of(b"{}", length=length))
        with pytest.raises(HeaderError, match=f"header says {length} bytes"):
            read_header(stream, 2**40 if length > 1000 else 10)
        assert stream.largest == 8


def test_the_library_refuses_what_is_refused_here(tmp_path: Path) -> None:
    """The two agree on what a gap, an overlap and a wrong size are."""
    for header in ({"t": entry(4, 8)}, {"a": entry(), "b": entry()}, {"t": entry(shape=[2])}, {}):
        path = tmp_path / "wrong.safetensors"
        path.write_bytes(file_of(header, b"\x00" * 4))
        with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
            pass
