"""Messages and files as they were once sent must be read for ever.

`messages/*.json` holds one message each, with the schema that reads it. Never edit one: when a schema grows, add
another file. A change that breaks one of these breaks a device that nobody will update.
"""

import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from assets.vocabulary_files import read_vocabulary
from assets.wire_files import read_message
from cotuning.examples import Example, render_prompt
from protocol import assignments, devices, errors, events, federations, health, operators, pages, runs, webhooks
from protocol.base import RequestModel, ResponseModel
from protocol.headers import ADAPTER_FORMAT, METADATA_BASE, METADATA_FORMAT
from protocol.pages import Page
from protocol.safetensors_header import TensorInfo, read_header

FOLDER = Path(__file__).parent
RECORDED = sorted((FOLDER / "messages").glob("*.json"))
PART_OF_OTHERS = {
    # Only ever inside another message, whose example holds one.
    "ArtifactRef", "ModelFile", "Part", "DeviceProfile", "FieldProblem", "ModelLoading", "ProxySettings",
    "EvaluationSettings", "Scores", "RoundDevice", "AlignmentMetrics", "DeviceMetrics", "Page",
    "Waiting", "VersionStep", "ModelFingerprint", "AssignmentName",
}  # fmt: skip


def schema_of(recorded: dict[str, Any]) -> type[BaseModel]:
    module, _, name = recorded["schema"].partition(".")
    found: type[BaseModel] = getattr(importlib.import_module(f"protocol.{module}"), name)
    return Page[found] if recorded.get("page") else found  # type: ignore[valid-type]


def load(path: Path) -> tuple[type[BaseModel], dict[str, Any]]:
    recorded = json.loads(path.read_text(encoding="utf-8"))
    return schema_of(recorded), recorded["message"]


def instants(value: Any) -> Any:
    """Spell every time the same way: `Z` and `+00:00` are one."""
    if isinstance(value, dict):
        return {key: instants(item) for key, item in value.items()}
    if isinstance(value, list):
        return [instants(item) for item in value]
    return value.replace("+00:00", "Z") if isinstance(value, str) else value


def assert_contains(read: Any, recorded: Any, place: str) -> None:
    """All that was recorded is there, with its value; a newer schema may have more."""
    if isinstance(recorded, dict):
        for key, value in recorded.items():
            assert key in read, f"{place}.{key} was dropped"
            assert_contains(read[key], value, f"{place}.{key}")
    elif isinstance(recorded, list):
        assert len(read) == len(recorded), place
        for number, (one, other) in enumerate(zip(read, recorded, strict=True)):
            assert_contains(one, other, f"{place}[{number}]")
    else:
        assert read == recorded, place


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_message_is_read_without_loss(path: Path) -> None:
    schema, message = load(path)
    read = schema.model_validate_json(json.dumps(message))
    assert_contains(instants(read.model_dump(mode="json")), instants(message), path.stem)
    assert schema.model_validate_json(read.model_dump_json()) == read


def test_every_message_has_an_example() -> None:
    modules = [assignments, devices, errors, events, federations, health, operators, pages, runs, webhooks]
    sent = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, RequestModel | ResponseModel)
        and value.__module__ == module.__name__
    }
    recorded = {json.loads(path.read_text(encoding="utf-8"))["schema"].partition(".")[2] for path in RECORDED}
    assert sent - PART_OF_OTHERS - recorded == set()


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_server_refuses_unknown_fields_and_a_device_ignores_them(path: Path) -> None:
    schema, message = load(path)
    newer = {**message, "field_of_the_future": 1}
    if issubclass(schema, RequestModel):
        with pytest.raises(ValidationError, match="field_of_the_future"):
            schema.model_validate(newer)
    else:
        assert schema.model_validate(newer) == schema.model_validate(message)


def test_messages_cannot_be_changed_once_read() -> None:
    for path in RECORDED:
        schema, message = load(path)
        read = schema.model_validate(message)
        field = next(iter(schema.model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(read, field, None)


def test_times_without_a_zone_are_refused() -> None:
    naive = {"server_time": "2026-03-01T12:00:00", "next_within_seconds": 1}
    with pytest.raises(ValidationError, match="timezone"):
        devices.HeartbeatReceipt.model_validate(naive)


def test_a_recorded_delta_file() -> None:
    content = (FOLDER / "files" / "adapter_delta.safetensors").read_bytes()
    header = read_header(io.BytesIO(content), len(content))
    layer = "base_model.model.layers.0.self_attn.q_proj"
    assert header.tensors == {
        f"{layer}.lora_A.weight": TensorInfo("F32", (2, 4)),
        f"{layer}.lora_B.weight": TensorInfo("F32", (3, 2)),
    }
    assert header.metadata[METADATA_FORMAT] == ADAPTER_FORMAT
    assert len(header.metadata[METADATA_BASE]) == 64


def test_a_recorded_file_of_a_servers_message() -> None:
    message = read_message(FOLDER / "files" / "candidates.safetensors", "candidates")
    assert (message.metadata, message.tensors["group"].tolist()) == ({"num_groups": "3"}, [2])
    assert message.rows == [Example("candidate-0", "Name the colour of the sky.", "", "blue", task="colours")]


def test_a_recorded_file_of_a_tokenizer() -> None:
    vocabulary = read_vocabulary(FOLDER / "files" / "slm_vocabulary.safetensors")
    assert vocabulary.table.fingerprint == "c56877d0b3150237c81c8b440cb3247d6909e4ee983e1b24d0bf3f2cf9837192"
    assert render_prompt(vocabulary.tokenizer, Example("", "Why?", "", "")) == "<user>Why?</>"
