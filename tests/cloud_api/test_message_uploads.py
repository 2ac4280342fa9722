"""Messages and tokenizers of devices: what is admitted, what may be missing, and what is not sent twice."""

from datetime import UTC, datetime
from typing import Any

import pytest

from persistence import artifacts, results
from protocol.assignments import Assignment, PartUpload
from protocol.errors import ErrorCode
from protocol.headers import (
    MESSAGE_FORMAT,
    MESSAGE_ROWS,
    METADATA_FORMAT,
    METADATA_MESSAGE_FORMAT,
    METADATA_MESSAGE_KIND,
    VOCABULARY_FORMAT,
)
from protocol.part_sizes import MOST_COUNTS_BYTES, MOST_VOCABULARY_BYTES, most_features_bytes, most_logits_bytes
from protocol.safetensors_header import TensorInfo
from protocol.statuses import PartKind
from tests.cloud_api.running_api import DeviceClient, RunningApi, eventually, safetensors
from tests.cloud_api.test_uploads import refused

VOCABULARY = safetensors({"tokenizer": TensorInfo("U8", (9,))}, {METADATA_FORMAT: VOCABULARY_FORMAT})


def message(kind: str, *, fill: int = 0, tensors: dict[str, TensorInfo] | None = None, **header: str) -> bytes:
    metadata = {METADATA_MESSAGE_FORMAT: MESSAGE_FORMAT, METADATA_MESSAGE_KIND: kind} | header
    return safetensors(tensors or {"values": TensorInfo("F16", (2, 2))}, metadata, fill)


def work_of(api: RunningApi, strategy: str, device: DeviceClient | None = None, **run: Any) -> tuple[Any, Assignment]:
    device = device or api.enrol()
    api.running_run(device, strategy={"name": strategy}, **run)
    assignment = device.poll()
    assert assignment is not None
    return device, assignment


def publish(api: RunningApi, assignment: Assignment, message: bytes) -> str:
    """Do what a worker does once the only update is in; return the hash of the message that goes with the version."""
    now, run_id = datetime.now(UTC), assignment.run_id
    blob = api.cloud.blobs.put_bytes(message)
    candidate = results.Candidate(message_sha256=blob.sha256)
    with api.cloud.database.transaction() as session:
        artifacts.register(session, blob.sha256, blob.size, "llm_logits", run_id, now)
        counted = [assignment.assignment_id]
        results.finish_aggregation(session, api._claim(session, run_id, now), "worker", None, counted, {}, now)
        results.finish_co_tuning(session, api._claim(session, run_id, now), "worker", candidate, {}, now)
        results.finish_evaluation(session, api._claim(session, run_id, now), "worker", {}, True, now)
    return blob.sha256


def test_a_message_is_taken_and_counted_under_its_own_name(api: RunningApi) -> None:
    device, assignment = work_of(api, "feature_based")
    assert (assignment.uploads, assignment.optional_uploads) == ([PartKind.SLM_FEATURES], [PartKind.SLM_FEATURES])
    content = message("slm_features")
    assert device.upload(assignment, "slm_features", content).status_code == 201
    assert device.submit(assignment, {"slm_features": content}).status_code == 201
    traffic = api.operator.get(f"/v1/runs/{assignment.run_id}/traffic").json()
    assert traffic["up"]["slm_features"] == len(content)


def test_a_message_may_be_missing_and_what_every_update_has_may_not(api: RunningApi) -> None:
    device, assignment = work_of(api, "data_based")
    assert device.submit(assignment, {}).status_code == 201
    device, assignment = work_of(api, "fedmkt")
    problem = refused(device.submit(assignment, {}), ErrorCode.UPDATE_INCOMPLETE, 409)
    assert problem["expected"] == ["slm_vocabulary"]
    content = message("slm_logits")
    assert device.upload(assignment, "slm_logits", content).status_code == 201
    refused(device.submit(assignment, {"slm_logits": content}), ErrorCode.UPDATE_INCOMPLETE, 409)
    assert device.upload(assignment, "slm_vocabulary", VOCABULARY).status_code == 201
    parts = {"slm_logits": content, "slm_vocabulary": VOCABULARY}
    refused(device.submit(assignment, {"slm_vocabulary": VOCABULARY}), ErrorCode.UPDATE_INCOMPLETE, 409)
    assert device.submit(assignment, parts).status_code == 201


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (message("slm_logits", fill=7), "`message_kind`: expected slm_features, got slm_logits"),
        (message("slm_features", message_format="cotune-message/9"), "`message_format`: expected cotune-message/1"),
        (safetensors({"values": TensorInfo("F16", (2, 2))}), "got nothing"),
        (message("slm_features", tensors={MESSAGE_ROWS: TensorInfo("U8", (4,))}), "no text leaves a device"),
    ],
)
def test_a_message_of_another_kind_or_with_rows_is_refused(api: RunningApi, content: bytes, told: str) -> None:
    device, assignment = work_of(api, "feature_based")
    problem = refused(device.upload(assignment, "slm_features", content), ErrorCode.MESSAGE_MISMATCH, 422)
    assert told in str(problem["detail"])
    assert not api.stored(content)


def test_what_the_strategy_does_not_declare_is_refused(api: RunningApi) -> None:
    device, assignment = work_of(api, "feature_based")
    for kind in ("counts", "slm_logits", "slm_vocabulary", "logits"):
        problem = refused(device.upload(assignment, kind, message(kind)), ErrorCode.INVALID_FIELD, 422)
        assert problem["expected"] == ["slm_features"]
    refused(device.upload(assignment, "llm_features", message("llm_features")), ErrorCode.INVALID_FIELD, 422)


def test_a_message_is_bounded_by_what_an_honest_one_can_have(api: RunningApi) -> None:
    most = {
        ("fedmkt", "slm_logits"): lambda settings, size: most_logits_bytes(size, settings.top_k),
        ("fedmkt", "slm_vocabulary"): lambda settings, size: MOST_VOCABULARY_BYTES,
        ("feature_based", "slm_features"): lambda settings, size: most_features_bytes(size, settings.feature_size),
        ("data_based", "counts"): lambda settings, size: MOST_COUNTS_BYTES,
    }
    for (strategy, kind), bound in most.items():
        device, assignment = work_of(api, strategy)
        assert assignment.probe_set is not None
        expected = bound(assignment.strategy, assignment.probe_set.size_bytes)
        problem = refused(device.begin(assignment, kind, b" " * (expected + 1)), ErrorCode.BODY_TOO_LARGE, 413)
        assert problem["expected"] == expected


def test_a_tokenizer_that_the_device_has_sent_in_this_run_is_not_sent_again(api: RunningApi) -> None:
    devices = [api.enrol("a"), api.enrol("b")]
    api.running_run(*devices, strategy={"name": "fedmkt"}, min_updates=2)
    first, other = (device.poll() for device in devices)
    assert first is not None
    assert other is not None
    assert devices[0].upload(first, "slm_vocabulary", VOCABULARY).status_code == 201
    begun = PartUpload.model_validate_json(devices[1].begin(other, "slm_vocabulary", VOCABULARY).content)
    assert begun.receipt is None  # what another device has sent is none of its business
    refusal = {"reason": "no", "code": "busy"}
    devices[0].http.post(f"/v1/assignments/{first.assignment_id}/refusal", json=refusal)
    devices[1].http.post(f"/v1/assignments/{other.assignment_id}/refusal", json=refusal)
    api.operator.post(f"/v1/runs/{first.run_id}/retry")
    again = devices[0].poll()
    assert again is not None
    assert again.assignment_id != first.assignment_id
    begun = PartUpload.model_validate_json(devices[0].begin(again, "slm_vocabulary", VOCABULARY).content)
    assert begun.receipt is not None
    assert (begun.receipt.assignment_id, begun.received_bytes) == (again.assignment_id, len(VOCABULARY))
    refused(devices[0].upload(again, "slm_vocabulary", VOCABULARY + b" "), ErrorCode.UPDATE_CONFLICT, 409)
    assert devices[0].submit(again, {"slm_vocabulary": VOCABULARY}).status_code == 201


def test_the_step_after_the_last_round_is_given_to_who_delivered_it(api: RunningApi) -> None:
    device, assignment = work_of(api, "fedmkt")
    path = f"/v1/assignments/{assignment.assignment_id}/last-step"
    refused(device.http.get(path), ErrorCode.ILLEGAL_TRANSITION, 409)
    assert device.upload(assignment, "slm_vocabulary", VOCABULARY).status_code == 201
    assert device.submit(assignment, {"slm_vocabulary": VOCABULARY}).status_code == 201
    assert device.http.get(path).status_code == 204
    sha256 = publish(api, assignment, b"the last message")
    given = Assignment.model_validate_json(device.http.get(path).content)
    assert given.message is not None
    assert given.message.sha256 == sha256
    assert device.http.get(f"/v1/artifacts/{sha256}").content == b"the last message"
    # Counted once all is sent, so after the device has it.
    eventually(lambda: api.sent(assignment.run_id, "llm_logits") == len(b"the last message"))
    refused(api.enrol("stranger").http.get(path), ErrorCode.ASSIGNMENT_NOT_FOUND, 404)
    refused(api.enrol("another").http.get(f"/v1/artifacts/{sha256}"), ErrorCode.ARTIFACT_NOT_FOUND, 404)
