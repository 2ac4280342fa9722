import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as library_load

from assets.errors import TensorFileError
from assets.tensors import read_tensors, tensors_to_bytes
from protocol.safetensors_header import read_header

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.bool,
]


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"tensor.{place}": torch.randint(0, 2, (place, 3), generator=generator).to(dtype)
        for place, dtype in enumerate(DTYPES)
    }
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "view": torch.arange(6.0).view(2, 3).T}


def test_round_trip_of_every_dtype_and_of_the_metadata(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = tmp_path / "file.safetensors"
    path.write_bytes(tensors_to_bytes(tensors, {"format": "x", "ünï": '"quoted"'}))
    read, metadata = read_tensors(path)
    assert metadata == {"format": "x", "ünï": '"quoted"'}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_library_and_the_wires_header_check_read_it() -> None:
    content = tensors_to_bytes(some_tensors(), {"a": "b"})
    assert library_load(content).keys() == some_tensors().keys()
    header = read_header(io.BytesIO(content), len(content))
    assert header.metadata == {"a": "b"}
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in some_tensors().items()
    }


@settings(max_examples=30)
@given(st.permutations(list(some_tensors())), st.permutations(["x", "y", "z"]))
def test_equal_input_gives_equal_bytes_in_any_order(names: list[str], keys: list[str]) -> None:
    tensors = some_tensors()
    shuffled = tensors_to_bytes({name: tensors[name] for name in names}, {key: key * 2 for key in keys})
    assert shuffled == tensors_to_bytes(tensors, {key: key * 2 for key in "xyz"})


def test_nothing_at_all_is_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    path.write_bytes(tensors_to_bytes({}, {}))
    assert read_tensors(path) == ({}, {})


def test_every_tensor_starts_at_a_multiple_of_its_items() -> None:
    content = tensors_to_bytes({"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(2)}, {})
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}' in content
    assert b'"a":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}' in content


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(TensorFileError, match=r"file.safetensors: expected a safetensors file, found none"):
        read_tensors(path)
    whole = tensors_to_bytes({"a": torch.ones(100)}, {})
    for content in (b"", b"no", whole[:-1], whole[:20], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(TensorFileError, match=r"file.safetensors: expected a safetensors file"):
            read_tensors(path)


def test_a_complex_tensor_cannot_be_written() -> None:
    with pytest.raises(ValueError, match=r"tensor 'a': expected a plain dtype, got torch\.complex64"):
        tensors_to_bytes({"a": torch.zeros(1, dtype=torch.complex64)}, {})


def test_tensors_of_one_dtype_lie_one_behind_the_other(tmp_path: Path) -> None:
    """What goes through all of them can take them as one vector; and changing one does not change the file."""
    path = tmp_path / "file.safetensors"
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(4), "c": torch.randn(1, 5)}
    path.write_bytes(tensors_to_bytes(tensors, {}))
    read, _ = read_tensors(path)
    assert list(read) == ["a", "b", "c"]
    places = [tensor.data_ptr() for tensor in read.values()]
    assert [place - places[0] for place in places] == [0, 16, 40]
    read["a"].zero_()
    assert torch.equal(read["b"], tensors["b"])
    assert torch.equal(read_tensors(path)[0]["a"], tensors["a"])


def test_another_writers_unaligned_tensors_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([7], dtype=torch.uint8), "b": torch.tensor([1.5, -2.0])}
    entries = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + b"\x07" + tensors["b"].numpy().tobytes()
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    read, _ = read_tensors(path)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_dtype_that_is_not_ours_is_refused_by_name(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x00\x00")
    with pytest.raises(TensorFileError, match=r"tensor 'a': expected one of F64, .*, got F8_E4M3"):
        read_tensors(path)


def test_a_generators_state_can_be_set_from_a_file_that_puts_it_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    state = torch.Generator().manual_seed(5).get_state()
    path.write_bytes(tensors_to_bytes({"a": torch.zeros(3, dtype=torch.uint8), "b": state}, {}))
    generator = torch.Generator()
    generator.set_state(read_tensors(path)[0]["b"])
    assert torch.equal(torch.randn(4, generator=generator), torch.randn(4, generator=torch.Generator().manual_seed(5)))
