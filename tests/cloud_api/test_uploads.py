"""Uploads: admitted, refused, repeated, cut. Whatever is refused leaves nothing behind."""

import json
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from protocol.adapter_shapes import tensors_at_rank
from protocol.assignments import Assignment
from protocol.errors import ErrorCode
from protocol.headers import (
    ADAPTER_FORMAT,
    CONTENT_DIGEST_HEADER,
    METADATA_BASE,
    METADATA_FORMAT,
    METADATA_PROBE_SET,
    METADATA_PROXY,
    content_digest,
)
from protocol.part_sizes import most_delta_bytes, most_logits_bytes
from protocol.safetensors_header import TensorInfo
from protocol.statuses import PartKind
from protocol.strategies import CoPlmsSettings
from tests.cloud_api.running_api import (
    TENSORS,
    DeviceClient,
    RunningApi,
    delta_for,
    digest_header,
    eventually,
    logits,
    raw_request,
    running_api,
    safetensors,
    settings_in,
)

Work = tuple[DeviceClient, Assignment]


@pytest.fixture(scope="module")
def work(api: RunningApi) -> Work:
    """A device and its assignment, for tests in which nothing is taken."""
    return new_work(api)


@pytest.fixture
def own_work(api: RunningApi) -> Work:
    return new_work(api)


def new_work(api: RunningApi) -> Work:
    device = api.enrol()
    api.running_run(device)
    assignment = device.poll()
    assert assignment is not None
    return device, assignment


def refused(response: httpx.Response, code: ErrorCode, status: int) -> dict[str, object]:
    assert response.headers["Content-Type"] == "application/problem+json", response.text
    problem: dict[str, object] = response.json()
    assert (problem["code"], response.status_code) == (code.value, status), problem
    return problem


def test_an_update_is_stored_submitted_and_counted_as_traffic(api: RunningApi, own_work: Work) -> None:
    device, assignment = own_work
    parts = {"adapter_delta": delta_for(assignment), "logits": logits()}
    for kind, content in parts.items():
        response = device.upload(assignment, kind, content)
        assert response.status_code == 201, response.text
        assert response.json()["sha256"] == sha256(content).hexdigest()
        assert api.stored(content)
    response = device.submit(assignment, parts)
    assert response.status_code == 201, response.text
    shown = api.operator.get(f"/v1/runs/{assignment.run_id}/rounds/1").json()
    assert shown["devices"][0]["status"] == "submitted"
    assert shown["status"] == "aggregating"
    traffic = api.operator.get(f"/v1/runs/{assignment.run_id}/traffic").json()
    sizes = {kind: len(content) for kind, content in parts.items()}
    assert traffic["up"] == sizes | {"metrics": len(response.request.content)}
    assert traffic["down"] == {"assignment": len(assignment.model_dump_json())}


def test_the_same_again_gets_the_same_receipt_and_other_content_a_conflict(api: RunningApi, own_work: Work) -> None:
    device, assignment = own_work
    delta = delta_for(assignment)
    first, again = device.upload(assignment, "adapter_delta", delta), device.upload(assignment, "adapter_delta", delta)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    other = delta_for(assignment, fill=1)
    refused(device.upload(assignment, "adapter_delta", other), ErrorCode.UPDATE_CONFLICT, 409)
    assert not api.stored(other)  # Else a device could fill the disk with files that nobody wants.
    assert device.upload(assignment, "logits", logits()).status_code == 201
    parts = {"adapter_delta": delta, "logits": logits()}
    submitted, repeated = device.submit(assignment, parts), device.submit(assignment, parts)
    assert (submitted.status_code, repeated.status_code) == (201, 200)
    assert submitted.json() == repeated.json()
    refused(device.submit(assignment, parts, num_examples=11), ErrorCode.UPDATE_CONFLICT, 409)
    again = device.upload(assignment, "adapter_delta", delta)
    assert (again.status_code, again.json()) == (200, first.json())


@pytest.mark.parametrize(
    ("tensors", "code", "told"),
    [
        ({"a.lora_A.weight": TENSORS["a.lora_A.weight"]}, ErrorCode.WRONG_TENSOR_NAMES, "b.lora_B.weight"),
        (TENSORS | {"extra": TensorInfo("F32", (1,))}, ErrorCode.WRONG_TENSOR_NAMES, "extra"),
        (TENSORS | {"a.lora_A.weight": TensorInfo("F32", (4, 8))}, ErrorCode.WRONG_TENSOR_SHAPE, "[2, 8]"),
        (TENSORS | {"a.lora_A.weight": TensorInfo("F16", (2, 8))}, ErrorCode.WRONG_TENSOR_DTYPE, "F16"),
    ],
)
def test_tensors_that_the_adapter_does_not_have_are_refused(
    api: RunningApi, work: Work, tensors: dict[str, TensorInfo], code: ErrorCode, told: str
) -> None:
    device, assignment = work
    content = delta_for(assignment, tensors=tensors)
    problem = refused(device.upload(assignment, "adapter_delta", content), code, 422)
    assert told in str(problem["detail"])
    assert problem["expected"] != problem["received"]
    assert not api.stored(content)
    assert api.left_over() == []


def test_a_delta_of_another_rank_than_assigned_is_refused(api: RunningApi) -> None:
    """Too high and too low, with both sides named; the assigned one is taken."""
    device = api.enrol(max_adapter_rank=1)
    strategy = {"name": "co_plms", "device_ranks": "declared", "aggregation": "exact_svd", "proxy_lora": {"rank": 2}}
    api.running_run(device, strategy=strategy)
    assignment = device.poll()
    assert assignment is not None
    assert assignment.adapter_rank == 1
    for rank in (2, 3):
        content = delta_for(assignment, tensors=tensors_at_rank(TENSORS, rank))
        problem = refused(device.upload(assignment, "adapter_delta", content), ErrorCode.WRONG_TENSOR_SHAPE, 422)
        assert "this assignment's adapter_rank 1" in str(problem["detail"])
        assert problem["expected"] == ["a.lora_A.weight: [1, 8]", "b.lora_B.weight: [8, 1]"]
        assert problem["received"] == [f"a.lora_A.weight: [{rank}, 8]", f"b.lora_B.weight: [8, {rank}]"]
    content = delta_for(assignment, tensors=tensors_at_rank(TENSORS, 1))
    assert device.upload(assignment, "adapter_delta", content).status_code == 201


@pytest.mark.parametrize("key", [METADATA_BASE, METADATA_PROXY, METADATA_FORMAT])
def test_a_delta_from_another_base_is_refused(api: RunningApi, work: Work, key: str) -> None:
    device, assignment = work
    assert assignment.adapter is not None
    assert assignment.proxy_manifest is not None
    right = {
        METADATA_FORMAT: ADAPTER_FORMAT,
        METADATA_BASE: assignment.adapter.sha256,
        METADATA_PROXY: assignment.proxy_manifest.sha256,
    }
    for metadata in (right | {key: "0" * 64}, {name: value for name, value in right.items() if name != key}):
        content = safetensors(TENSORS, metadata)
        problem = refused(device.upload(assignment, "adapter_delta", content), ErrorCode.WRONG_BASE_VERSION, 409)
        assert problem["expected"] == right[key]
        assert problem["received"] == metadata.get(key)


def test_logits_of_another_probe_set_are_refused(work: Work) -> None:
    device, assignment = work
    content = safetensors({"ids": TensorInfo("U16", (1,))}, {METADATA_PROBE_SET: "0" * 64})
    refused(device.upload(assignment, "logits", content), ErrorCode.LOGITS_MISMATCH, 422)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"not a safetensors file at all",
        b"\xff" * 100,
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"{}",
        (50_000).to_bytes(8, "little") + b"[" * 50_000,
    ],
    ids=["empty", "zip", "text", "ones", "no object", "short", "deep"],
)
def test_what_is_not_safetensors_is_refused(api: RunningApi, work: Work, content: bytes) -> None:
    device, assignment = work
    refused(device.upload(assignment, "adapter_delta", content), ErrorCode.NOT_SAFETENSORS, 422)
    assert api.left_over() == []


def test_a_file_cut_at_any_place_is_refused(api: RunningApi, work: Work) -> None:
    device, assignment = work
    whole = delta_for(assignment)
    for length in (4, 8, 50, len(whole) // 2, len(whole) - 1):
        refused(device.upload(assignment, "adapter_delta", whole[:length]), ErrorCode.NOT_SAFETENSORS, 422)
    refused(device.upload(assignment, "adapter_delta", whole + b"\0"), ErrorCode.NOT_SAFETENSORS, 422)
    assert api.left_over() == []


def test_a_connection_cut_in_the_middle_leaves_nothing(api: RunningApi, own_work: Work) -> None:
    device, assignment = own_work
    content = delta_for(assignment)
    path = f"/v1/assignments/{assignment.assignment_id}/parts/adapter_delta"
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {device.credential}\r\n"
    head += (
        f"Content-Length: {len(content)}\r\n{CONTENT_DIGEST_HEADER}: {digest_header(content)[CONTENT_DIGEST_HEADER]}"
    )
    raw_request(api.url, head.encode() + b"\r\n\r\n" + content[:-10], close=True)
    eventually(lambda: api.left_over() == [])
    assert not api.stored(content)
    assert device.upload(assignment, "adapter_delta", content).status_code == 201


def test_an_upload_that_stands_still_is_given_up(home: Path) -> None:
    with running_api(settings_in(home, upload_idle_seconds=0.2)) as impatient:
        device = impatient.enrol()
        impatient.running_run(device)
        assignment = device.poll()
        assert assignment is not None
        content = delta_for(assignment)
        path = f"/v1/assignments/{assignment.assignment_id}/parts/adapter_delta"
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {device.credential}\r\n"
        head += f"Content-Length: {len(content)}\r\n{CONTENT_DIGEST_HEADER}: "
        head += f"{digest_header(content)[CONTENT_DIGEST_HEADER]}\r\n\r\n"
        answer = raw_request(impatient.url, head.encode() + content[:-10], close=False)
        assert b" 400 " in answer
        problem = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert (problem["code"], problem["expected"], problem["received"]) == (
            "truncated_body",
            len(content),
            len(content) - 10,
        )
        assert impatient.left_over() == []


def test_length_and_digest_are_required_and_checked(api: RunningApi, work: Work) -> None:
    device, assignment = work
    content = delta_for(assignment)
    path = f"/v1/assignments/{assignment.assignment_id}/parts/adapter_delta"
    refused(device.http.put(path, content=content), ErrorCode.INVALID_FIELD, 422)
    bad = {CONTENT_DIGEST_HEADER: "md5=:AAAA:"}
    refused(device.http.put(path, content=content, headers=bad), ErrorCode.INVALID_FIELD, 422)
    chunked = device.http.put(path, content=iter([content]), headers=digest_header(content))
    refused(chunked, ErrorCode.LENGTH_REQUIRED, 411)
    wrong = {CONTENT_DIGEST_HEADER: content_digest("0" * 64)}
    problem = refused(device.http.put(path, content=content, headers=wrong), ErrorCode.DIGEST_MISMATCH, 422)
    assert problem["received"] == sha256(content).hexdigest()
    assert not api.stored(content)
    assert api.left_over() == []


def test_what_is_too_large_is_refused_before_it_is_read(home: Path) -> None:
    with running_api(settings_in(home, upload_limits=dict.fromkeys(PartKind, 200))) as strict:
        device = strict.enrol()
        strict.running_run(device)
        assignment = device.poll()
        assert assignment is not None
        assert assignment.upload_limits == {PartKind.ADAPTER_DELTA: 200, PartKind.LOGITS: 200}
        content = delta_for(assignment)
        problem = refused(device.upload(assignment, "adapter_delta", content), ErrorCode.BODY_TOO_LARGE, 413)
        assert (problem["expected"], problem["received"]) == (200, str(len(content)))
        # Only the head is sent: the answer cannot have waited for the body.
        path = f"/v1/assignments/{assignment.assignment_id}/parts/adapter_delta"
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {device.credential}\r\n"
        head += f"Content-Length: {10**15}\r\n{CONTENT_DIGEST_HEADER}: {content_digest('0' * 64)}\r\n\r\n"
        assert b" 413 " in raw_request(strict.url, head.encode(), close=False)


def test_a_part_is_bounded_by_what_an_honest_one_can_have(work: Work) -> None:
    device, assignment = work
    assert assignment.probe_set is not None
    assert isinstance(assignment.strategy, CoPlmsSettings)
    most = {
        "adapter_delta": most_delta_bytes(TENSORS),
        "logits": most_logits_bytes(assignment.probe_set.size_bytes, assignment.strategy.top_k),
    }
    for kind, expected in most.items():
        problem = refused(device.upload(assignment, kind, b" " * (expected + 1)), ErrorCode.BODY_TOO_LARGE, 413)
        assert problem["expected"] == expected
        refused(device.upload(assignment, kind, b" " * expected), ErrorCode.NOT_SAFETENSORS, 422)


def test_a_part_that_the_strategy_does_not_have_is_refused(api: RunningApi) -> None:
    device = api.enrol()
    api.running_run(device, strategy={"name": "standalone"}, llm=None, public_data=None)
    assignment = device.poll()
    assert assignment is not None
    refused(device.upload(assignment, "logits", logits()), ErrorCode.INVALID_FIELD, 422)
    refused(device.upload(assignment, "model", logits()), ErrorCode.INVALID_FIELD, 422)


def test_a_device_touches_its_own_assignments_only(api: RunningApi, work: Work) -> None:
    _, assignment = work
    stranger = api.enrol("stranger")
    refused(stranger.upload(assignment, "logits", logits()), ErrorCode.ASSIGNMENT_NOT_FOUND, 404)
    refused(stranger.submit(assignment, {}), ErrorCode.ASSIGNMENT_NOT_FOUND, 404)
    for action, body in (("progress", {"status": "training"}), ("refusal", {"reason": "no", "code": "busy"})):
        path = f"/v1/assignments/{assignment.assignment_id}/{action}"
        refused(stranger.http.post(path, json=body), ErrorCode.ASSIGNMENT_NOT_FOUND, 404)


def test_a_closed_round_takes_nothing_and_the_assignment_is_late(api: RunningApi) -> None:
    quick, slow = api.enrol("quick"), api.enrol("slow")
    run = api.running_run(quick, slow)
    theirs, assignment = quick.poll(), slow.poll()
    assert theirs is not None
    assert assignment is not None
    parts = {"adapter_delta": delta_for(theirs), "logits": logits()}
    for kind, content in parts.items():
        assert quick.upload(theirs, kind, content).status_code == 201
    assert slow.upload(assignment, "logits", logits(1)).status_code == 201
    # `min_updates` is 1 and there is no grace: this closes the round.
    assert quick.submit(theirs, parts).status_code == 201
    delta = delta_for(assignment, fill=3)
    refused(slow.upload(assignment, "adapter_delta", delta), ErrorCode.ROUND_CLOSED, 409)
    refused(slow.submit(assignment, {}), ErrorCode.ROUND_CLOSED, 409)
    assert not api.stored(delta)
    shown = api.operator.get(f"/v1/runs/{run.run_id}/rounds/1").json()
    assert {each["device_name"]: each["status"] for each in shown["devices"]} == {"quick": "submitted", "slow": "late"}


def test_an_incomplete_submission_is_refused(own_work: Work) -> None:
    device, assignment = own_work
    delta = delta_for(assignment)
    assert device.upload(assignment, "adapter_delta", delta).status_code == 201
    refused(device.submit(assignment, {"adapter_delta": delta}), ErrorCode.UPDATE_INCOMPLETE, 409)
    parts = {"adapter_delta": delta, "logits": logits()}
    refused(device.submit(assignment, parts), ErrorCode.UPDATE_INCOMPLETE, 409)
    wrong = device.submit(assignment, parts, base_sha256="0" * 64)
    refused(wrong, ErrorCode.WRONG_BASE_VERSION, 409)


@pytest.mark.parametrize(
    ("field", "number"), [("num_spans", -9), ("num_spans", 10**400), ("skipped_rows", -1), ("skipped_rows", 2**63)]
)
def test_an_alignment_report_with_impossible_counts_is_refused(
    api: RunningApi, work: Work, field: str, number: int
) -> None:
    device, assignment = work
    report = {"coverage": 0.9, "class_agreement": 0.9, "num_spans": 10, "skipped_rows": 0} | {field: number}
    response = device.submit(assignment, {}, metrics={"alignment": report})
    assert field in str(refused(response, ErrorCode.INVALID_FIELD, 422)["detail"])
