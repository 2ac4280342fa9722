"""The real application on a real socket, in a thread of the test's process, with the moves of a run in one line each.

The worker's part is played with `persistence` as the worker plays it, but for the mathematics.
"""

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from cloud_api.accepting import LOOP
from cloud_api.app import create_app
from cloud_api.brief_memory import Rate
from cloud_api.cloud import Cloud, open_cloud
from cloud_api.reading import reading_little
from cloud_api.security import Rates
from cloud_api.server import GRACE_SECONDS, Server, bind
from cloud_api.settings import Settings
from persistence import artifacts, jobs, results
from persistence.blobs import StoredBlob
from persistence.jobs import JobRecord
from protocol.assignments import Assignment, PartUpload
from protocol.headers import (
    ADAPTER_FORMAT,
    CONTENT_DIGEST_HEADER,
    METADATA_BASE,
    METADATA_FORMAT,
    METADATA_PROXY,
    content_digest,
)
from protocol.operators import OperatorRole
from protocol.queue import embedded_broker_url
from protocol.runs import Run
from protocol.safetensors_header import DTYPE_BYTES, TensorInfo

PLENTY = Rate(10_000, 10_000)
KEY = "operator-key-of-the-tests"
TENSORS = {"a.lora_A.weight": TensorInfo("F32", (2, 8)), "b.lora_B.weight": TensorInfo("F32", (8, 2))}
PROFILE = {
    "agent_version": "0.1.0",
    "platform": "Linux x86_64",
    "cpu_count": 2,
    "memory_bytes": 2**30,
    "model_name": "tiny",
    "model_architecture": "gpt2",
    "model_parameters": 1000,
    "tokenizer_kind": "byte-level BPE, 300 tokens",
    "num_examples": 10,
}


def safetensors(
    tensors: Mapping[str, TensorInfo] = TENSORS, metadata: Mapping[str, str] | None = None, fill: int = 0
) -> bytes:
    """Write a safetensors file by its published layout; every byte of data is `fill`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    position = 0
    for name, info in tensors.items():
        size = DTYPE_BYTES[info.dtype] * math.prod(info.shape)
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes([fill]) * position


def delta_for(assignment: Assignment, *, fill: int = 0, tensors: Mapping[str, TensorInfo] = TENSORS) -> bytes:
    """A delta that the round of the assignment admits."""
    assert assignment.adapter is not None
    assert assignment.proxy_manifest is not None
    metadata = {
        METADATA_FORMAT: ADAPTER_FORMAT,
        METADATA_BASE: assignment.adapter.sha256,
        METADATA_PROXY: assignment.proxy_manifest.sha256,
    }
    return safetensors(tensors, metadata, fill)


def logits(fill: int = 0) -> bytes:
    """A file of logits, as far as the API looks at it."""
    return safetensors({"ids": TensorInfo("U16", (4, 8))}, {}, fill)


def plain_client(url: str, headers: Mapping[str, str]) -> httpx.Client:
    """A client for plain HTTP. `verify`: a client that knew the certificates of the world would load them, in 20 ms."""
    return httpx.Client(base_url=url, headers=headers, timeout=40, trust_env=False, verify=False)


def digest_header(content: bytes) -> dict[str, str]:
    return {CONTENT_DIGEST_HEADER: content_digest(sha256(content).hexdigest())}


def offset_header(offset: int) -> dict[str, str]:
    return {"Upload-Offset": str(offset)}


def upload_path(upload: PartUpload) -> str:
    return f"/v1/assignments/{upload.assignment_id}/parts/{upload.kind.value}/uploads/{upload.upload_id}"


@dataclass(frozen=True)
class DeviceClient:
    """An enrolled device."""

    device_id: str
    credential: str
    http: httpx.Client

    def poll(self, wait_seconds: int = 0) -> Assignment | None:
        response = self.http.get("/v1/devices/me/assignment", params={"wait_seconds": wait_seconds})
        assert response.status_code in {200, 204}, response.text
        return Assignment.model_validate_json(response.content) if response.status_code == 200 else None

    def upload(self, assignment: Assignment, kind: str, content: bytes) -> httpx.Response:
        path = f"/v1/assignments/{assignment.assignment_id}/parts/{kind}"
        return self.http.put(path, content=content, headers=digest_header(content))

    def begin(self, assignment: Assignment, kind: str, content: bytes, **changed: str) -> httpx.Response:
        headers = {"Upload-Length": str(len(content)), "Repr-Digest": content_digest(sha256(content).hexdigest())}
        path = f"/v1/assignments/{assignment.assignment_id}/parts/{kind}/uploads"
        return self.http.post(path, headers=headers | {name.replace("_", "-"): text for name, text in changed.items()})

    def send_chunk(self, upload: PartUpload, content: bytes, offset: int | None = None) -> httpx.Response:
        """Send the chunk of `content`, the whole file, that starts at `offset`."""
        start = upload.received_bytes if offset is None else offset
        chunk = content[start : start + upload.chunk_bytes]
        return self.http.patch(upload_path(upload), content=chunk, headers=digest_header(chunk) | offset_header(start))

    def complete(self, upload: PartUpload) -> httpx.Response:
        return self.http.post(f"{upload_path(upload)}/completion")

    def upload_in_chunks(self, assignment: Assignment, kind: str, content: bytes) -> httpx.Response:
        """Send a file of more than one chunk; the answer is that to the last chunk, or the first that is no success."""
        response = self.begin(assignment, kind, content)
        upload = PartUpload.model_validate_json(response.content)
        while response.is_success and upload.receipt is None:
            response = self.send_chunk(upload, content)
            if response.is_success:
                upload = PartUpload.model_validate_json(response.content)
        return response

    def begin_with_chunk(
        self, assignment: Assignment, kind: str, content: bytes, chunk_bytes: int, **changed: str
    ) -> httpx.Response:
        """Send a file's first chunk without asking before."""
        chunk = content[:chunk_bytes]
        headers = {"Upload-Length": str(len(content)), "Repr-Digest": content_digest(sha256(content).hexdigest())}
        path = f"/v1/assignments/{assignment.assignment_id}/parts/{kind}/uploads"
        changes = {name.replace("_", "-"): text for name, text in changed.items()}
        return self.http.post(path, content=chunk, headers=headers | digest_header(chunk) | changes)

    def submit(self, assignment: Assignment, parts: Mapping[str, bytes], **changed: Any) -> httpx.Response:
        body = {
            "base_sha256": assignment.adapter.sha256 if assignment.adapter else None,
            "num_examples": 10,
            "parts": [
                {"kind": kind, "sha256": sha256(content).hexdigest(), "size_bytes": len(content)}
                for kind, content in parts.items()
            ],
            "metrics": {},
        }
        return self.http.post(f"/v1/assignments/{assignment.assignment_id}/submission", json=body | changed)


@dataclass
class RunningApi:
    """The API and its operator."""

    cloud: Cloud
    url: str
    operator: httpx.Client
    _clients: list[httpx.Client] = field(default_factory=list)

    def client(self, credential: str | None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        client = plain_client(self.url, headers)
        self._clients.append(client)
        return client

    def operator_key(self, role: OperatorRole) -> str:
        response = self.operator.post("/v1/operators/keys", json={"name": role.value, "role": role.value})
        assert response.status_code == 201, response.text
        return str(response.json()["key"])

    def token(self, uses: int = 1, **changed: Any) -> str:
        response = self.operator.post("/v1/enrolment-tokens", json={"uses": uses} | changed)
        assert response.status_code == 201, response.text
        return str(response.json()["token"])

    def enrol(self, name: str = "device", **profile: Any) -> DeviceClient:
        body = {"token": self.token(), "name": name, "profile": PROFILE | profile}
        response = self.client(None).post("/v1/devices", json=body)
        assert response.status_code == 201, response.text
        receipt = response.json()
        return DeviceClient(receipt["device_id"], receipt["credential"], self.client(receipt["credential"]))

    def create_run(self, **changed: Any) -> Run:
        body = {
            "name": "run",
            "strategy": {"name": "co_plms"},
            "rounds": 1,
            "llm": "hub/llm",
            "public_data": "hub/data",
            "grace_seconds": 0,
        }
        response = self.operator.post("/v1/runs", json=body | changed)
        assert response.status_code == 201, response.text
        return Run.model_validate_json(response.content)

    def prepare(
        self,
        run: Run,
        *,
        with_files: bool = True,
        tensors: Mapping[str, TensorInfo] = TENSORS,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Do what a worker does for a new run: round 1 is open afterwards."""
        now = datetime.now(UTC)
        if not with_files:
            with self.cloud.database.transaction() as session:
                job = self._claim(session, run.run_id, now)
                results.finish_prepare(session, job, "worker", results.PrepareResult(), now)
            return
        files = {
            kind: self.cloud.blobs.put_bytes(f"{kind} of {run.run_id}".encode())
            for kind in ("proxy_base", "adapter", "probe_set", "llm_adapter")
        }
        with self.cloud.database.transaction() as session:
            job = self._claim(session, run.run_id, now)
            for kind, blob in files.items():
                artifacts.register(session, blob.sha256, blob.size, kind, run.run_id, now)
            result = results.PrepareResult(
                proxy_manifest_sha256=files["proxy_base"].sha256,
                adapter_sha256=files["adapter"].sha256,
                llm_adapter_sha256=files["llm_adapter"].sha256,
                probe_set_sha256=files["probe_set"].sha256,
                expected_tensors=tensors,
                metrics=metrics or {},
            )
            results.finish_prepare(session, job, "worker", result, now)

    def running_run(self, *devices: DeviceClient, **changed: Any) -> Run:
        """A run for these devices whose first round is open."""
        run = self.create_run(device_ids=[device.device_id for device in devices], **changed)
        self.prepare(run)
        return run

    def stored(self, content: bytes) -> bool:
        return self.cloud.blobs.exists(sha256(content).hexdigest())

    def stages(self) -> list[str]:
        """Uploads that have chunks."""
        return [name for name, _ in self.cloud.blobs.stages()]

    def left_over(self) -> list[Path]:
        """Files of uploads that were begun and not ended."""
        return list(self.cloud.blobs.incoming.iterdir())

    def put(self, content: bytes, run: Run, kind: str = "probe_set") -> StoredBlob:
        """Store a file of a run, as a worker does."""
        blob = self.cloud.blobs.put_bytes(content)
        with self.cloud.database.transaction() as session:
            artifacts.register(session, blob.sha256, blob.size, kind, run.run_id, datetime.now(UTC))
        return blob

    def sent(self, run_id: str, kind: str) -> int:
        """Bytes of a kind that devices of a run were sent, so far as it is counted yet."""
        down: dict[str, int] = self.operator.get(f"/v1/runs/{run_id}/traffic").json()["down"]
        return down.get(kind, 0)

    def close(self) -> None:
        for client in [*self._clients, self.operator]:
            client.close()

    @staticmethod
    def _claim(session: Any, run_id: str, now: datetime) -> JobRecord:
        for message in jobs.due_for_sending(session, now, resend_after_seconds=0):
            job = jobs.claim(session, message.job_id, "worker", 60, now)
            if job is not None and job.run_id == run_id:
                return job
        raise AssertionError(f"no job of {run_id} waits")


def settings_in(home: Path, **changed: Any) -> Settings:
    """Settings with everything under `home`, as quick as tests want it."""
    (home / "queue").mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "home": home,
        "database_url": f"sqlite:///{home / 'cotune.sqlite3'}",
        "broker_url": embedded_broker_url(home),
        "queue_prefix": "",
        "blobs": home / "blobs",
        "operator_key": KEY,
        "feed_seconds": 0.05,
        "trusted_seconds": 0.0,  # a short poll finds what was committed a moment ago
        "probe_seconds": 0,
        # Tests fail to authenticate, and enrol, more often in a second than anybody in a day; test_rate_limits.py.
        "rates": Rates(failure=PLENTY, enrolment=PLENTY),
    }
    return Settings(**(values | changed))


@contextlib.contextmanager
def running_api(settings: Settings) -> Iterator[RunningApi]:
    """Serve on a free port. The database's schema must be there."""
    cloud = open_cloud(settings)
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        create_app(cloud),
        loop=LOOP,
        http=reading_little(cloud.transfers),
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = Server(config, cloud)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    operator = plain_client(url, {"Authorization": f"Bearer {KEY}"})
    api = RunningApi(cloud, url, operator)
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield api
    finally:
        api.close()
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


def raw_request(url: str, request: bytes, *, close: bool) -> bytes:
    """Send bytes over a socket; then hang up at once, or read until the server does."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        if close:
            return b""
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


def eventually(condition: Any, seconds: float = 5.0) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)
