"""What a client or an operator can get wrong, through real processes: what is said, and that nothing is lost."""

import contextlib
import hashlib
import json
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import load, save

from cotuning.payload import PAYLOAD_FORMAT
from protocol.assignments import Assignment
from protocol.devices import DeviceProfile, EnrolmentTokenCreate
from protocol.errors import PROBLEM_MEDIA_TYPE, ErrorCode, Problem
from protocol.events import EventType
from protocol.headers import CONTENT_DIGEST_HEADER, content_digest
from protocol.runs import Run
from protocol.safetensors_header import HeaderError, read_header
from protocol.statuses import PartKind, RunStatus
from tests.end_to_end.small_cloud import SmallCloud, write_rows

PROFILE = DeviceProfile(
    agent_version="test", platform="test", cpu_count=1, memory_bytes=1, model_name="m", model_architecture="gpt2",
    model_parameters=1, tokenizer_kind="BPE", num_examples=1,
).model_dump(mode="json")  # fmt: skip


@dataclass
class Stranger:
    """A device that speaks HTTP by hand, and the assignment that it was given."""

    http: httpx.Client
    device_id: str
    run_id: str = ""
    assignment: Assignment | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        assert self.assignment is not None
        return f"/v1/assignments/{self.assignment.assignment_id}"

    def put(self, content: bytes, *, kind: str = "adapter_delta", digest: bytes | None = None) -> httpx.Response:
        sha256 = hashlib.sha256(content if digest is None else digest).hexdigest()
        return self.http.put(
            f"{self.path}/parts/{kind}", content=content, headers={CONTENT_DIGEST_HEADER: content_digest(sha256)}
        )

    def delta(self, changes: dict[str, torch.Tensor | None] | None = None, **metadata: str) -> bytes:
        """A delta of zeros with the right names; `changes` replace tensors, None takes one away."""
        tensors = {name: torch.zeros_like(value) for name, value in self.tensors.items()} | (changes or {})
        return save({name: each for name, each in tensors.items() if each is not None}, self.metadata | metadata)

    def submission(self, delta: bytes, logits: bytes, base: str | None = None) -> dict[str, Any]:
        assert self.assignment is not None
        assert self.assignment.adapter is not None
        parts = [
            {"kind": kind, "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
            for kind, content in (("adapter_delta", delta), ("logits", logits))
        ]
        return {
            "base_sha256": base or self.assignment.adapter.sha256, "num_examples": 3, "parts": parts, "metrics": {},
        }  # fmt: skip


def problem(answer: httpx.Response, status: int, code: ErrorCode) -> Problem:
    assert answer.headers["content-type"].startswith(PROBLEM_MEDIA_TYPE), answer.text
    found = Problem.model_validate_json(answer.content)
    assert (answer.status_code, found.code) == (status, code), found
    assert found.detail
    return found


def enrol(cloud: SmallCloud, name: str) -> Stranger:
    token = cloud.client.create_token(EnrolmentTokenCreate()).token
    answer = httpx.post(
        f"{cloud.address}/v1/devices", json={"token": token, "name": name, "profile": PROFILE}, trust_env=False
    )
    assert answer.status_code == 201, answer.text
    return Stranger(cloud.as_device(answer.json()["credential"]), answer.json()["device_id"])


def begin_round(cloud: SmallCloud, stranger: Stranger, name: str) -> Stranger:
    """Give the stranger a run of its own, and wait for its assignment."""
    config = cloud.run_config(name, device_ids=[stranger.device_id], min_updates=1, rounds=1, grace_seconds=0.0)
    stranger.run_id = cloud.client.create_run(config).run_id
    answers: list[httpx.Response] = []

    def assigned() -> bool:
        answers[:] = [stranger.http.get("/v1/devices/me/assignment", params={"wait_seconds": 1})]
        return answers[0].status_code == 200

    cloud.wait(assigned)
    assignment = Assignment.model_validate_json(answers[0].content)
    assert assignment.adapter is not None
    assert assignment.proxy_manifest is not None
    base = stranger.http.get(f"/v1/artifacts/{assignment.adapter.sha256}")
    stranger.assignment = assignment
    stranger.tensors = load(base.content)
    stranger.metadata = {
        "format": "cotune-adapter/1",
        "base_sha256": assignment.adapter.sha256,
        "proxy_sha256": assignment.proxy_manifest.sha256,
    }
    return stranger


@pytest.fixture(scope="module")
def stranger(cloud: SmallCloud) -> Iterator[Stranger]:
    stranger = begin_round(cloud, enrol(cloud, "stranger"), "bad-updates")
    yield stranger
    if cloud.client.get_run(stranger.run_id).status is RunStatus.RUNNING:
        cloud.client.stop_run(stranger.run_id)
    stranger.http.close()


# --- enrolment and credentials ---


def test_an_unknown_and_a_used_token(cloud: SmallCloud) -> None:
    body = {"token": "no-such-token-at-all", "name": "late", "profile": PROFILE}
    problem(httpx.post(f"{cloud.address}/v1/devices", json=body), 401, ErrorCode.ENROLMENT_TOKEN_UNKNOWN)
    body["token"] = cloud.client.create_token(EnrolmentTokenCreate()).token
    assert httpx.post(f"{cloud.address}/v1/devices", json=body).status_code == 201
    body["name"] = "later"
    problem(httpx.post(f"{cloud.address}/v1/devices", json=body), 409, ErrorCode.ENROLMENT_TOKEN_USED)


def test_an_unknown_token_at_the_device(cloud: SmallCloud, tmp_path: Path) -> None:
    command = cloud.agent(
        "enroll", "--home", str(tmp_path), "--server", cloud.address, "--token", "no-such-token-at-all",
        "--name", "late", "--model", str(cloud.models["slm-0"]), "--data", str(cloud.data["device-0"]),
    )  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "token" in ended.stderr


@pytest.mark.parametrize("credential", ["", "nonsense", "device.secret"])
def test_a_wrong_credential(cloud: SmallCloud, credential: str) -> None:
    headers = {"Authorization": f"Bearer {credential}"} if credential else {}
    for path in ("/v1/devices/me", "/v1/devices/me/assignment"):
        problem(httpx.get(cloud.address + path, headers=headers), 401, ErrorCode.UNAUTHENTICATED)


def test_a_device_is_not_an_operator_and_the_other_way_round(cloud: SmallCloud, stranger: Stranger) -> None:
    problem(stranger.http.get("/v1/runs"), 403, ErrorCode.FORBIDDEN)
    with cloud.as_device(cloud.key) as operator:
        problem(operator.get("/v1/devices/me"), 403, ErrorCode.FORBIDDEN)


# --- requests ---


def test_malformed_json(cloud: SmallCloud) -> None:
    with cloud.as_device(cloud.key) as operator:
        headers = {"Content-Type": "application/json"}
        answer = operator.post("/v1/runs", content=b'{"name": ', headers=headers)
    problem(answer, 400, ErrorCode.MALFORMED_REQUEST)


def test_an_unknown_run(cloud: SmallCloud) -> None:
    with cloud.as_device(cloud.key) as operator:
        for path in ("", "/rounds", "/rounds/1", "/events", "/traffic", "/versions"):
            found = problem(operator.get(f"/v1/runs/no-such-run{path}"), 404, ErrorCode.RUN_NOT_FOUND)
            assert "no-such-run" in found.detail


@pytest.mark.parametrize(
    ("change", "code", "where"),
    [
        ({"strategy": {"name": "fed_magic"}}, ErrorCode.UNKNOWN_STRATEGY, "fed_magic"),
        ({"rounds": 0}, ErrorCode.INVALID_FIELD, "rounds"),
        ({"round": 3}, ErrorCode.INVALID_FIELD, "round"),
    ],
)
def test_a_wrong_run_config(cloud: SmallCloud, change: dict[str, Any], code: ErrorCode, where: str) -> None:
    with cloud.as_device(cloud.key) as operator:
        answer = operator.post("/v1/runs", json=cloud.run_config("wrong", **change))
    found = problem(answer, 422, code)
    assert where in answer.text
    assert found.errors or found.expected


# --- an update ---


def test_bytes_that_are_not_safetensors(stranger: Stranger) -> None:
    problem(stranger.put(b"PK\x03\x04 this is a zip file, or so it says"), 422, ErrorCode.NOT_SAFETENSORS)
    problem(stranger.put(stranger.delta()[:-4]), 422, ErrorCode.NOT_SAFETENSORS)


def test_wrong_tensor_names(stranger: Stranger) -> None:
    name = next(iter(stranger.tensors))
    found = problem(stranger.put(stranger.delta({name: None})), 422, ErrorCode.WRONG_TENSOR_NAMES)
    assert name in found.model_dump_json()
    extra = stranger.put(stranger.delta({"surprise": torch.zeros(1)}))
    assert "surprise" in problem(extra, 422, ErrorCode.WRONG_TENSOR_NAMES).model_dump_json()


def test_wrong_tensor_shape_and_dtype(stranger: Stranger) -> None:
    name, tensor = next(iter(stranger.tensors.items()))
    shape = problem(stranger.put(stranger.delta({name: torch.zeros(1, 1)})), 422, ErrorCode.WRONG_TENSOR_SHAPE)
    assert shape.expected is not None
    assert shape.received is not None
    half = torch.zeros_like(tensor, dtype=torch.float16)
    problem(stranger.put(stranger.delta({name: half})), 422, ErrorCode.WRONG_TENSOR_DTYPE)


def test_a_delta_from_another_base(stranger: Stranger) -> None:
    problem(stranger.put(stranger.delta(base_sha256="f" * 64)), 409, ErrorCode.WRONG_BASE_VERSION)


def test_a_wrong_digest(stranger: Stranger) -> None:
    problem(stranger.put(stranger.delta(), digest=b"something else"), 422, ErrorCode.DIGEST_MISMATCH)


def raw_put(cloud: SmallCloud, stranger: Stranger, length: int, content: bytes, *, hang_up: bool) -> str:
    """Send a request that promises `length` bytes and has `content`; return the answer's first line, "" for none."""
    address = urlsplit(cloud.address)
    head = (
        f"PUT {stranger.path}/parts/adapter_delta HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Authorization: {stranger.http.headers['Authorization']}\r\nContent-Length: {length}\r\n"
        f"Content-Digest: {content_digest(hashlib.sha256(content).hexdigest())}\r\n\r\n"
    )
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=30) as connection:
        connection.sendall(head.encode() + content)
        if hang_up:
            connection.shutdown(socket.SHUT_WR)
        return connection.recv(65536).decode(errors="replace").partition("\r\n")[0]


def test_an_oversized_body_is_refused_by_what_it_promises(cloud: SmallCloud, stranger: Stranger) -> None:
    assert stranger.assignment is not None
    limit = stranger.assignment.upload_limits[PartKind.ADAPTER_DELTA]
    assert " 413 " in raw_put(cloud, stranger, limit + 1, b"\0" * 100, hang_up=False)


def test_a_truncated_body(cloud: SmallCloud, stranger: Stranger) -> None:
    """The connection ends before the body does: nothing is kept, and a whole upload afterwards is welcome."""
    content = stranger.delta()
    answer = raw_put(cloud, stranger, len(content), content[:100], hang_up=True)
    assert answer == "" or " 400 " in answer


def test_a_body_without_a_length(stranger: Stranger) -> None:
    answer = stranger.http.put(f"{stranger.path}/parts/adapter_delta", content=iter([stranger.delta()]))
    problem(answer, 411, ErrorCode.LENGTH_REQUIRED)


def test_a_submission_without_its_parts(stranger: Stranger) -> None:
    body = stranger.submission(stranger.delta(marker="never uploaded"), b"nor this")
    problem(stranger.http.post(f"{stranger.path}/submission", json=body), 409, ErrorCode.UPDATE_INCOMPLETE)


def test_the_same_again_is_welcome_and_another_is_not(stranger: Stranger) -> None:
    content = stranger.delta()
    first = stranger.put(content)
    assert first.status_code == 201, first.text
    again = stranger.put(content)
    assert (again.status_code, again.json()) == (200, first.json())
    name, tensor = next(iter(stranger.tensors.items()))
    problem(stranger.put(stranger.delta({name: torch.ones_like(tensor)})), 409, ErrorCode.UPDATE_CONFLICT)


def test_a_submission_from_another_base(stranger: Stranger) -> None:
    body = stranger.submission(stranger.delta(), b"-", base="e" * 64)
    problem(stranger.http.post(f"{stranger.path}/submission", json=body), 409, ErrorCode.WRONG_BASE_VERSION)


def test_an_update_for_a_closed_round(cloud: SmallCloud, stranger: Stranger) -> None:
    """Last of those on this round: stopping the run closes it."""
    cloud.client.stop_run(stranger.run_id)
    problem(stranger.put(stranger.delta()), 409, ErrorCode.ROUND_CLOSED)


def honest_logits(cloud: SmallCloud, stranger: Stranger) -> bytes:
    """Logits that a real agent uploaded for the same proxy and the same probe set: equal settings give equal files."""
    assert stranger.assignment is not None
    assert stranger.assignment.proxy_manifest is not None
    config = cloud.run_config("for-its-logits", rounds=1)
    assert cloud.wait_for_run(cloud.client.create_run(config).run_id).status is RunStatus.COMPLETED
    for path in (cloud.folder / "cloud" / "blobs").rglob("*"):
        with contextlib.suppress(HeaderError, OSError), open(path, "rb") as stream:
            found = read_header(stream, path.stat().st_size).metadata
            if (found.get("format"), found.get("proxy_sha256")) == (
                PAYLOAD_FORMAT, stranger.assignment.proxy_manifest.sha256,
            ):  # fmt: skip
                return path.read_bytes()
    raise AssertionError("no agent has uploaded logits for this proxy")


def test_values_that_are_not_finite_are_refused_by_the_worker(cloud: SmallCloud) -> None:
    stranger = begin_round(cloud, enrol(cloud, "infinite"), "not-finite")
    with contextlib.closing(stranger.http):
        name, tensor = next(iter(stranger.tensors.items()))
        delta = stranger.delta({name: torch.full_like(tensor, float("nan"))})
        logits = honest_logits(cloud, stranger)
        assert stranger.put(delta).status_code == 201
        assert stranger.put(logits, kind="logits").status_code == 201
        answer = stranger.http.post(f"{stranger.path}/submission", json=stranger.submission(delta, logits))
        assert answer.status_code == 201, answer.text
    run = cloud.wait_for_run(stranger.run_id)
    assert (run.status, run.error_code) == (RunStatus.FAILED, ErrorCode.TOO_FEW_UPDATES)
    rejected = [each for each in cloud.events(run.run_id) if each.type is EventType.UPDATE_REJECTED]
    assert [each.data["code"] for each in rejected] == [ErrorCode.NON_FINITE_VALUES]
    assert [each.num_updates for each in cloud.client.list_versions(run.run_id)] == [0]


# --- files ---


def failed_run(cloud: SmallCloud, **changes: Any) -> Run:
    return cloud.wait_for_run(cloud.client.create_run(cloud.run_config("files", **changes)).run_id)


def test_a_missing_model_folder_is_refused_with_its_name(cloud: SmallCloud) -> None:
    with cloud.as_device(cloud.key) as operator:
        answer = operator.post("/v1/runs", json=cloud.run_config("files", llm="/no/such/llm"))
    found = problem(answer, 422, ErrorCode.MODEL_FOLDER_MISSING)
    assert "/no/such/llm" in found.detail


def test_a_folder_that_holds_no_whole_model_fails_the_run_with_its_name(cloud: SmallCloud, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    run = failed_run(cloud, llm=str(tmp_path))
    assert (run.status, run.error_code) == (RunStatus.FAILED, ErrorCode.MODEL_FOLDER_MISSING)
    assert str(tmp_path) in (run.status_reason or "")


@pytest.mark.parametrize(
    ("second_line", "said"),
    [('{"instruction": "a", ', "JSON"), ('{"instruction": "a", "input": ""}', "output")],
)
def test_public_data_with_a_broken_line_or_a_missing_column(
    cloud: SmallCloud, tmp_path: Path, second_line: str, said: str
) -> None:
    path = write_rows(tmp_path / "public.jsonl", [{"id": "1", "instruction": "a", "input": "", "output": "b"}])
    path.write_text(path.read_text() + second_line + "\n")
    run = failed_run(cloud, public_data=str(path))
    assert (run.status, run.error_code) == (RunStatus.FAILED, ErrorCode.DATA_FILE_INVALID)
    assert f"{path}:2:" in (run.status_reason or "")
    assert said in (run.status_reason or "")


def test_private_data_with_a_broken_line(cloud: SmallCloud, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n{broken\n")
    command = cloud.agent(
        "enroll", "--home", str(tmp_path / "home"), "--server", cloud.address, "--token", "not-reached",
        "--name", "broken", "--model", str(cloud.models["slm-0"]), "--data", str(path),
    )  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 4, ended.stderr
    assert f"{path}:2:" in ended.stderr
