"""Devices that are revoked while they deliver: what they sent must not be counted, and must hold nobody up."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos.cloud import Cloud
from benchmarks.chaos.device import ALIGNED, delta
from benchmarks.chaos.mutations import digest_of
from benchmarks.chaos.plan import Fault, Plan
from protocol.assignments import Assignment

STAGES = (
    *("with an assignment", "in the middle of a part", "between two chunks", "after its last chunk"),
    *("after its parts", "after its submission"),
)
REVOKED = "revoked"
NUMBER = 99


@dataclass
class Victims:
    """Enrols a device a round and revokes it at one of `STAGES`.

    Args:
        logits: a file of probe logits that would be admitted.
        gate: round -> the gate that holds it open. What is being aggregated stays counted, so a round must not close
            between a victim's submission and its revocation.
    """

    cloud: Cloud
    plan: Plan
    logits: Path
    gate: Callable[[int], Path]
    admitted_afterwards: list[str] = field(default_factory=list)
    """What the service took from a device after it had been revoked; must stay empty."""
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, round_number: int) -> None:
        """Begin with the next stage, in a thread of its own."""
        thread = threading.Thread(target=self._suffer, args=(round_number,))
        thread.start()
        self._threads.append(thread)

    def join(self) -> None:
        """Wait for all."""
        for thread in self._threads:
            thread.join()

    def _suffer(self, round_number: int) -> None:
        try:
            self._be_revoked(STAGES[(round_number - 1) % len(STAGES)])
        finally:
            self.gate(round_number).unlink(missing_ok=True)

    def _be_revoked(self, stage: str) -> None:
        device_id, credential = self.cloud.enrol(f"victim {stage}")
        with self.cloud.device_client(f"victim {stage}", credential) as http:
            answer = http.get("/v1/devices/me/assignment", params={"wait_seconds": 20})
            if answer.status_code == 200:
                fault = Fault(REVOKED, stage, "device")
                with contextlib.suppress(httpx.TransportError):
                    self._deliver(Assignment.model_validate_json(answer.content), http, stage, device_id)
                self.plan.faults.append(fault)
                self.plan.happens(fault)
        self._revoke(device_id)

    def _revoke(self, device_id: str) -> None:
        self.cloud.ask("POST", f"/v1/devices/{device_id}/revoke")

    def _deliver(self, assignment: Assignment, http: httpx.Client, stage: str, device_id: str) -> None:
        assert assignment.adapter is not None
        adapter = http.get(f"/v1/artifacts/{assignment.adapter.sha256}").content
        parts = {"adapter_delta": delta(assignment, adapter, NUMBER), "logits": self.logits.read_bytes()}
        path = f"/v1/assignments/{assignment.assignment_id}"
        if stage == STAGES[0]:
            self._revoke(device_id)
        if stage == STAGES[1]:
            content = parts["adapter_delta"]
            halves = self._halves(content, device_id)
            headers = {"Content-Digest": digest_of(content), "Content-Length": str(len(content))}
            status = http.put(f"{path}/parts/adapter_delta", content=halves, headers=headers).status_code
            self._must_refuse(f"{stage}: the rest of the part", status)
        if stage in STAGES[2:4]:
            self._send_chunks(f"{path}/parts/adapter_delta/uploads", parts["adapter_delta"], http, stage, device_id)
        for kind, content in parts.items():
            headers = {"Content-Digest": digest_of(content)}
            status = http.put(f"{path}/parts/{kind}", content=content, headers=headers).status_code
            if stage in STAGES[:4]:
                self._must_refuse(f"{stage}: {kind}", status)
        if stage == STAGES[4]:
            self._revoke(device_id)
        submission = _submission(assignment, parts)
        status = http.post(f"{path}/submission", **submission).status_code
        if stage != STAGES[5]:
            self._must_refuse(f"{stage}: submission", status)
            return
        self._revoke(device_id)
        self._must_refuse(f"{stage}: again", http.post(f"{path}/submission", **submission).status_code)

    def _halves(self, content: bytes, device_id: str) -> Iterator[bytes]:
        """Give half a part, have the device revoked, give the rest."""
        half = len(content) // 2
        yield content[:half]
        self._revoke(device_id)
        yield content[half:]

    def _send_chunks(self, path: str, content: bytes, http: httpx.Client, stage: str, device_id: str) -> None:
        """Have the device revoked after the first chunk, or after the last and before the completion."""
        begun = http.post(path, headers={"Upload-Length": str(len(content)), "Repr-Digest": digest_of(content)}).json()
        size, upload = begun["chunk_bytes"], f"{path}/{begun['upload_id']}"
        last = (len(content) - 1) // size * size
        for offset in range(0, len(content), size):
            chunk = content[offset : offset + size]
            headers = {"Content-Digest": digest_of(chunk), "Upload-Offset": str(offset)}
            status = http.patch(upload, content=chunk, headers=headers).status_code
            if stage == STAGES[2] and offset > 0:
                self._must_refuse(f"{stage}: the chunk at {offset}", status)
            if (stage == STAGES[2] and offset == 0) or offset == last:
                self._revoke(device_id)
        self._must_refuse(f"{stage}: completion", http.post(f"{upload}/completion").status_code)

    def _must_refuse(self, what: str, status: int) -> None:
        if status < 400:
            self.admitted_afterwards.append(f"a revoked device, {what}: {status}")


def _submission(assignment: Assignment, parts: dict[str, bytes]) -> dict[str, Any]:
    """Return the body with its digest, which the signature covers."""
    submission = {
        "base_sha256": assignment.adapter.sha256 if assignment.adapter else None,
        "num_examples": 8,
        "parts": [
            {"kind": kind, "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
            for kind, content in parts.items()
        ],
        "metrics": {"alignment": ALIGNED},
    }
    body = json.dumps(submission).encode()
    return {"content": body, "headers": {"Content-Digest": digest_of(body), "Content-Type": "application/json"}}
