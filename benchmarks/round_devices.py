"""Devices that echo: each takes its assignment, downloads the adapter and sends it back as its delta, for ever.

What an agent says and sends, by the agent's own client (but unsigned, and without its outbox): poll, report, download,
upload in chunks, submit; what fails is tried again. Nothing is trained. `python -m benchmarks.round_devices <address>
<file>`; the file is JSON: `credentials`, `numbers` of the devices, `logits` (a file that fits every round) and a
`folder`.
"""

import functools
import hashlib
import itertools
import json
import os
import random
import struct
import sys
import threading
import traceback
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from benchmarks.chaos.device import read_tensor_infos, write_safetensors
from edge_agent.backoff import Backoff, Retrier
from edge_agent.client import CloudClient
from edge_agent.ledger import Ledger
from edge_agent.uploading import upload_file
from protocol.assignments import Assignment, AssignmentProgress, Part, Submission
from protocol.headers import ADAPTER_FORMAT, METADATA_BASE, METADATA_FORMAT, METADATA_PROXY
from protocol.runs import DeviceMetrics
from protocol.statuses import AssignmentStatus, PartKind

WAIT_SECONDS = 20
Reported = Literal[AssignmentStatus.ACCEPTED, AssignmentStatus.UPLOADING]


def now() -> datetime:
    """The devices' clock."""
    return datetime.now(UTC)


def echo(assignment: Assignment, adapter: bytes, number: int) -> bytes:
    """Return the adapter as a delta; one value tells the devices apart, so that no two files are the same."""
    assert assignment.adapter is not None
    assert assignment.proxy_manifest is not None
    metadata = {
        METADATA_FORMAT: ADAPTER_FORMAT,
        METADATA_BASE: assignment.adapter.sha256,
        METADATA_PROXY: assignment.proxy_manifest.sha256,
    }
    begin = 8 + int.from_bytes(adapter[:8], "little")
    data = struct.pack("<f", number * 1e-6) + adapter[begin + 4 :]
    return write_safetensors(read_tensor_infos(adapter), data, metadata)


def work(client: CloudClient, retrier: Retrier, number: int, logits: Path, delta: Path) -> None:
    """Wait for an assignment and do it."""
    assignment = retrier.call("poll", lambda: client.next_assignment(WAIT_SECONDS))
    if assignment is None:
        return
    adapter = assignment.adapter
    assert adapter is not None
    report(client, retrier, assignment, AssignmentStatus.ACCEPTED)
    content = retrier.call("download", lambda: downloaded(client, adapter.sha256))
    delta.write_bytes(echo(assignment, content, number))
    report(client, retrier, assignment, AssignmentStatus.UPLOADING)
    files = {PartKind.ADAPTER_DELTA: delta, PartKind.LOGITS: logits}
    parts = [part_of(kind, file) for kind, file in files.items()]
    for part in parts:
        attempts = itertools.count()
        upload = functools.partial(upload_file, client, assignment, part, files[part.kind])
        retrier.call("upload", lambda: upload(fresh=next(attempts) == 0))  # noqa: B023
    submission = Submission(base_sha256=adapter.sha256, num_examples=8, parts=parts, metrics=DeviceMetrics())
    retrier.call("submit", lambda: client.submit(assignment, submission))


def downloaded(client: CloudClient, sha256: str) -> bytes:
    """Download a file and check it."""
    content = bytearray()
    client.download(sha256, 0, lambda chunk, _position: content.extend(chunk))
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"expected the file {sha256}, got {len(content)} other bytes")
    return bytes(content)


def report(client: CloudClient, retrier: Retrier, assignment: Assignment, status: Reported) -> None:
    """Say where the device is."""
    progress = AssignmentProgress(status=status)
    retrier.call("progress", lambda: client.report_progress(assignment, progress))


def part_of(kind: PartKind, file: Path) -> Part:
    """Describe a file of an update."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Part(kind=kind, sha256=digest, size_bytes=file.stat().st_size)


def live(address: str, logits: Path, folder: Path, credential: str, number: int) -> None:
    """One device's life."""
    ledger, stop = Ledger(folder / f"ledger-{number}.jsonl", now), threading.Event()
    retrier = Retrier(stop.wait, lambda: Backoff(random.random))
    with CloudClient(address, credential, ledger, stop, now=now) as client:
        while True:
            work(client, retrier, number, logits, folder / f"delta-{number}.safetensors")


def main() -> None:
    """Let each device live in a thread of its own; the first error ends them all."""
    address, order = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    one = functools.partial(live, address, Path(order["logits"]), Path(order["folder"]))
    with ThreadPoolExecutor(len(order["credentials"])) as pool:
        lives = list(map(functools.partial(pool.submit, one), order["credentials"], order["numbers"]))
        for ended in wait(lives, return_when=FIRST_COMPLETED).done:
            traceback.print_exception(ended.exception())
        sys.stderr.flush()
        os._exit(1)  # the others would go on


if __name__ == "__main__":
    main()
