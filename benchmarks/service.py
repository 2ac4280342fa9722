"""The service: bytes a second that the API takes from devices, against a bare server that hashes and stores them.

Both are processes of their own behind uvicorn with the same loop and parser, on the same disk; the same four
connections send to each in turn. The bare sink reads a body, hashes it, writes it to a file, synchronises the file and
renames it, and knows nothing of devices, rounds or a database. The API's share of the turn is whole: authentication,
admission, the header's check, the transactions, the receipt; in chunks also their requests and putting them together.
"""

import argparse
import json
import math
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx

from benchmarks.measuring import Goal, compare, print_goals, print_table, write_results
from edge_agent.uploading import CHUNK_BYTES
from persistence import artifacts, jobs, results
from persistence.blobs import FolderBlobStore
from persistence.database import Database
from protocol.headers import (
    ADAPTER_FORMAT,
    CONTENT_DIGEST_HEADER,
    METADATA_BASE,
    METADATA_FORMAT,
    METADATA_PROXY,
    REPR_DIGEST_HEADER,
    UPLOAD_LENGTH_HEADER,
    UPLOAD_OFFSET_HEADER,
    content_digest,
)
from protocol.safetensors_header import DTYPE_BYTES, TensorInfo

KEY = secrets.token_hex(32)
TENSORS = {"a.lora_A.weight": TensorInfo("F32", (1024, 2560))}
CONNECTIONS = 4
UPLOADS = 8
"""In a turn."""
MIB = 2**20
PROFILE = {
    "agent_version": "0", "platform": "Linux", "cpu_count": 1, "memory_bytes": 2**30, "model_name": "none",
    "model_architecture": "none", "model_parameters": 1, "tokenizer_kind": "none", "num_examples": 1,
}  # fmt: skip

SINK = """
import asyncio, hashlib, os, secrets, sys, uvicorn
folder = sys.argv[1]
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    name, digest, more = os.path.join(folder, secrets.token_hex(16)), hashlib.sha256(), True
    with open(name, "xb", buffering=0) as file:
        while more:
            message = await receive()
            digest.update(message["body"])
            file.write(message["body"])
            more = message.get("more_body", False)
        await asyncio.to_thread(os.fsync, file.fileno())
    os.replace(name, os.path.join(folder, digest.hexdigest()))
    await send({"type": "http.response.start", "status": 201, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
uvicorn.run(app, port=int(sys.argv[2]), loop="uvloop", http="httptools", log_level="warning", lifespan="off")
"""


@dataclass(frozen=True)
class Work:
    """A device's credential, its assignment and the file that it will send."""

    credential: str
    assignment_id: str
    content: bytes
    digest: str
    chunks: list[tuple[int, bytes, str]]
    """Where each starts, its bytes and its digest: a device's work, which is not the service's."""


def delta(base_sha256: str, proxy_sha256: str) -> bytes:
    """A delta of random bytes that the round admits."""
    header: dict[str, Any] = {
        "__metadata__": {METADATA_FORMAT: ADAPTER_FORMAT, METADATA_BASE: base_sha256, METADATA_PROXY: proxy_sha256}
    }
    position = 0
    for name, info in TENSORS.items():
        size = DTYPE_BYTES[info.dtype] * math.prod(info.shape)
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + os.urandom(position)


class Api:
    """The API's process, and a run whose devices have only to upload."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, home: Path, database_url: str) -> None:
        self.process = process
        self.url = url
        self._operator = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False, timeout=60
        )
        self._database = Database(database_url)
        self._blobs = FolderBlobStore(home / "blobs")

    def new_work(self, count: int) -> list[Work]:
        """Enrol devices, begin a run for them and prepare it, and take their assignments."""
        token = self._operator.post("/v1/enrolment-tokens", json={"uses": count}).json()["token"]
        devices = [
            httpx.post(f"{self.url}/v1/devices", json={"token": token, "name": "device", "profile": PROFILE}).json()
            for _ in range(count)
        ]
        self.open_round([device["device_id"] for device in devices])
        return [self._take(device["credential"]) for device in devices]

    def open_round(self, device_ids: Sequence[str]) -> float:
        """Create a run for these devices and do what a worker does to prepare it: its first round is open then.

        Returns:
            When the worker's part began to be committed (`time.time`, seconds).
        """
        run = {
            "name": "run", "strategy": {"name": "co_plms"}, "rounds": 1, "llm": "hub/llm", "public_data": "hub/data",
            "device_ids": list(device_ids),
        }  # fmt: skip
        created = self._operator.post("/v1/runs", json=run).raise_for_status()
        return self._prepare(created.json()["run_id"])

    def _prepare(self, run_id: str) -> float:
        now = datetime.now(UTC)
        kinds = ("proxy_base", "adapter", "llm_adapter", "probe_set")
        blobs = {kind: self._blobs.put_bytes(f"{kind} of {run_id}".encode()) for kind in kinds}
        hashes = [blobs[kind].sha256 for kind in kinds]
        with self._database.transaction() as session:
            due = jobs.due_for_sending(session, now, resend_after_seconds=0)
            (job,) = [job for each in due if (job := jobs.claim(session, each.job_id, "worker", 60, now))]
            for kind, blob in blobs.items():
                artifacts.register(session, blob.sha256, blob.size, kind, run_id, now)
            prepared = results.PrepareResult(*hashes, expected_tensors=TENSORS)
            results.finish_prepare(session, job, "worker", prepared, now)
            return time.time()

    def _take(self, credential: str) -> Work:
        headers = {"Authorization": f"Bearer {credential}"}
        assignment = httpx.get(f"{self.url}/v1/devices/me/assignment", headers=headers).json()
        content = delta(assignment["adapter"]["sha256"], assignment["proxy_manifest"]["sha256"])
        chunks = [(offset, content[offset : offset + CHUNK_BYTES]) for offset in range(0, len(content), CHUNK_BYTES)]
        with_digests = [(offset, chunk, sha256(chunk).hexdigest()) for offset, chunk in chunks]
        return Work(credential, assignment["assignment_id"], content, sha256(content).hexdigest(), with_digests)

    def peak_mib(self) -> float:
        """The most memory that the process has held, MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def close(self) -> None:
        """Let go of the connections."""
        self._operator.close()
        self._database.dispose()


@contextmanager
def running_api(folder: Path, database_url: str | None = None) -> Iterator[Api]:
    """Start the API on a free port, with everything in `folder` but perhaps the database."""
    url = database_url or f"sqlite:///{folder / 'cotune.sqlite3'}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COTUNE_")}
    environment |= {"COTUNE_HOME": str(folder), "COTUNE_OPERATOR_KEY": KEY, "COTUNE_LOG_LEVEL": "error"}
    environment["COTUNE_DATABASE_URL"] = url
    # All devices of the benchmark are at one address.
    environment |= {"COTUNE_RATE_ADDRESS": "100000/100000", "COTUNE_RATE_ENROLMENT": "100000/100000"}
    environment |= {"COTUNE_RATE_DEVICE": "100000/100000", "COTUNE_REQUIRE_SIGNATURES": "off"}
    command = [sys.executable, "-m", "cloud_api", "--port", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    api = None
    try:
        api = Api(process, process.stdout.readline().split()[3].rstrip(","), folder, url)
        yield api
    finally:
        if api is not None:
            api.close()
        process.terminate()
        process.communicate()


@contextmanager
def running_sink(folder: Path, port: int) -> Iterator[str]:
    """Start the bare server."""
    process = subprocess.Popen([sys.executable, "-c", SINK, str(folder), str(port)])
    url = f"http://127.0.0.1:{port}"
    transport = httpx.HTTPTransport(retries=20)
    try:
        with httpx.Client(transport=transport) as client:
            client.put(url, content=b"").raise_for_status()
        yield url
    finally:
        process.terminate()
        process.wait()


def send_to_sink(http: httpx.Client, url: str, work: Work) -> None:
    """One request without more."""
    http.put(url, content=work.content).raise_for_status()


def send_at_once(http: httpx.Client, url: str, work: Work) -> None:
    """As a device sends a small file."""
    headers = {"Authorization": f"Bearer {work.credential}", CONTENT_DIGEST_HEADER: content_digest(work.digest)}
    path = f"{url}/v1/assignments/{work.assignment_id}/parts/adapter_delta"
    http.put(path, content=work.content, headers=headers).raise_for_status()


def send_in_chunks(http: httpx.Client, url: str, work: Work) -> None:
    """As a device sends a large file: the first chunk begins the upload, the last one completes it."""
    who = {"Authorization": f"Bearer {work.credential}"}
    path = f"{url}/v1/assignments/{work.assignment_id}/parts/adapter_delta/uploads"
    (_, first, digest), *others = work.chunks
    file = {UPLOAD_LENGTH_HEADER: str(len(work.content)), REPR_DIGEST_HEADER: content_digest(work.digest)}
    headers = who | file | {CONTENT_DIGEST_HEADER: content_digest(digest)}
    upload = http.post(path, content=first, headers=headers).raise_for_status().json()
    path = f"{path}/{upload['upload_id']}"
    for offset, chunk, digest in others:
        headers = who | {CONTENT_DIGEST_HEADER: content_digest(digest), UPLOAD_OFFSET_HEADER: str(offset)}
        upload = http.patch(path, content=chunk, headers=headers).raise_for_status().json()
    assert upload["receipt"]["sha256"] == work.digest


Sender = Callable[[httpx.Client, str, Work], None]


def measure_uploads(turns: int) -> dict[str, Any]:
    """Time the three ways in turns; return MiB a second, ratios and the API's peak memory as the uploads go on."""
    folder = Path(tempfile.mkdtemp(prefix="cotune-bench-"))
    (folder / "sink").mkdir()
    peaks: list[float] = []
    try:
        with running_api(folder / "api") as api, running_sink(folder / "sink", 18_711) as sink:
            batches = {name: api.new_work(UPLOADS * (turns + 1)) for name in ("sink", "at once", "in chunks")}
            clients = [httpx.Client(timeout=120, trust_env=False) for _ in range(CONNECTIONS)]

            def send(name: str, sender: Sender, url: str) -> None:
                batch = [batches[name].pop() for _ in range(UPLOADS)]
                with ThreadPoolExecutor(CONNECTIONS) as pool:
                    shares = [batch[number::CONNECTIONS] for number in range(CONNECTIONS)]
                    list(pool.map(lambda one, share: [sender(one, url, work) for work in share], clients, shares))
                if name != "sink":
                    peaks.append(api.peak_mib())

            timings = compare(
                {
                    "sink": lambda: send("sink", send_to_sink, sink),
                    "at once": lambda: send("at once", send_at_once, api.url),
                    "in chunks": lambda: send("in chunks", send_in_chunks, api.url),
                },
                turns,
            )
            for client in clients:
                client.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    body_mib = len(delta("0" * 64, "0" * 64)) / MIB
    return {
        "body_mib": body_mib,
        "uploads_a_turn": UPLOADS,
        "connections": CONNECTIONS,
        "mib_a_second": {name: UPLOADS * body_mib / timing.seconds for name, timing in timings.items()},
        "against_sink": {name: timing.speed_ratio for name, timing in timings.items()},
        "quartiles": {name: timing.speed_quartiles for name, timing in timings.items()},
        "peak_mib_first": statistics.mean(peaks[:2]),
        "peak_mib_last": peaks[-1],
        "uploads": UPLOADS * len(peaks),
    }


def show(measured: dict[str, Any]) -> list[Goal]:
    """Print the table, and return what was aimed at."""
    rows = [
        (name, speed, measured["against_sink"][name], *measured["quartiles"][name])
        for name, speed in measured["mib_a_second"].items()
    ]
    title = f"uploads of {measured['body_mib']:.0f} MiB over {measured['connections']} connections"
    print_table(title, ("way", "MiB a second", "against the sink", "25 %", "75 %"), rows)
    growth = measured["peak_mib_last"] / measured["peak_mib_first"]
    after = f"{measured['uploads']} uploads against {2 * UPLOADS}"
    return [
        Goal("upload at once, speed against a bare sink", measured["against_sink"]["at once"], 0.8, True),
        Goal("upload in chunks, speed against a bare sink", measured["against_sink"]["in chunks"], 0.8, True),
        Goal(f"the API's peak memory after {after}", growth, 1.1, False),
    ]


def main() -> None:
    """Measure, print, and write `results/bench_service.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    measured = measure_uploads(parser.parse_args().repeats)
    goals = show(measured)
    print_goals("bench-service", goals)
    write_results("service", {"uploads": measured, "goals": [vars(goal) | {"met": goal.met} for goal in goals]})


if __name__ == "__main__":
    main()
