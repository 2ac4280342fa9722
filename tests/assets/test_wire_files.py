"""Messages as files, and what of a device's result becomes one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from assets.errors import TensorFileError
from assets.tensors import tensors_to_bytes
from assets.wire_files import message_file, read_message, update_files
from cotuning.examples import Example
from cotuning.strategies.results import DeviceResult, Message
from protocol.headers import MESSAGE_ROWS
from protocol.statuses import PartKind
from protocol.strategies import STRATEGIES

ROWS = [
    Example("candidate-0", "Say é", "of\u2028this", "x\r\ny", task="t"),
    Example("candidate-1", "b", "", "c", references=("d", "e")),
]
MESSAGE = Message({"group": torch.tensor([3, 1])}, {"num_groups": "4"}, ROWS)
RESULT = DeviceResult({}, 1, {}, message=Message({"kept": torch.tensor([1])}, {"a": "b"}))


def written(folder: Path, message: Message, kind: str) -> Path:
    path = folder / "message"
    path.write_bytes(message_file(message, kind))
    return path


def files_of(name: str, result: DeviceResult) -> dict[PartKind, bytes]:
    given = {"model_sha256": None, "adapter_sha256": None, "probe_set_sha256": None}
    return update_files(result, STRATEGIES[name], vocabulary=lambda: b"tokenizer", **given)


def test_a_message_is_read_as_it_was_written(tmp_path: Path) -> None:
    read = read_message(written(tmp_path, MESSAGE, "candidates"), "candidates")
    assert (read.metadata, read.rows) == (MESSAGE.metadata, ROWS)
    assert torch.equal(read.tensors["group"], MESSAGE.tensors["group"])
    assert message_file(read, "candidates") == message_file(MESSAGE, "candidates")
    empty = read_message(written(tmp_path, Message(), "candidates"), "candidates")
    assert (empty.tensors, empty.metadata, empty.rows) == ({}, {}, [])


def test_a_message_of_another_kind_or_form_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, MESSAGE, "candidates")
    with pytest.raises(TensorFileError, match="`message_kind`: expected llm_logits, got candidates"):
        read_message(path, "llm_logits")
    path.write_bytes(tensors_to_bytes(MESSAGE.tensors, {}))
    with pytest.raises(TensorFileError, match="`message_format`: expected cotune-message/1, got nothing"):
        read_message(path, "candidates")
    with pytest.raises(ValueError, match=r"expected no tensor 'message\.rows'"):
        message_file(Message({MESSAGE_ROWS: torch.zeros(1)}), "candidates")


@pytest.mark.parametrize("rows", [torch.zeros(2), torch.tensor([[65]], dtype=torch.uint8), torch.tensor([255, 10])])
def test_rows_that_are_none_are_refused(rows: torch.Tensor, tmp_path: Path) -> None:
    path, header = tmp_path / "message", {"message_format": "cotune-message/1", "message_kind": "candidates"}
    path.write_bytes(tensors_to_bytes({MESSAGE_ROWS: rows}, header))
    with pytest.raises(TensorFileError, match="expected rows as"):
        read_message(path, "candidates")
    path.write_bytes(tensors_to_bytes({MESSAGE_ROWS: torch.tensor([255, 10], dtype=torch.uint8)}, header))
    with pytest.raises(TensorFileError, match="line 1: expected UTF-8, got byte 0xff"):
        read_message(path, "candidates")


def test_what_a_strategy_does_not_declare_becomes_no_file() -> None:
    assert files_of("standalone", RESULT) == {}
    assert files_of("fedmkt", RESULT).keys() == {PartKind.SLM_VOCABULARY, PartKind.SLM_LOGITS}
    assert files_of("data_based", RESULT).keys() == {PartKind.COUNTS}
    assert files_of("data_based", replace(RESULT, message=None)) == {}


def test_no_text_becomes_a_file() -> None:
    with pytest.raises(ValueError, match="expected a device's message without rows, got 2"):
        files_of("data_based", replace(RESULT, message=MESSAGE))
