"""Devices that are revoked while they deliver: what they sent must not be counted, and must hold nobody up."""

import contextlib
import hashlib
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos.cloud import Cloud
from benchmarks.chaos.device import ALIGNED, delta
from benchmarks.chaos.mutations import digest_of
from benchmarks.chaos.plan import Fault, Plan
from benchmarks.chaos.servers import HOST
from protocol.assignments import Assignment

STAGES = ("with an assignment", "in the middle of a part", "after its parts", "after its submission")
REVOKED = "revoked"
NUMBER = 99


@dataclass
class Victims:
    """Enrols a device a round and revokes it at one of `STAGES`.

    Args:
        logits: a file of probe logits that would be admitted.
    """

    cloud: Cloud
    plan: Plan
    logits: Path
    admitted_afterwards: list[str] = field(default_factory=list)
    """What the service took from a device after it had been revoked; must stay empty."""
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, round_number: int) -> None:
        """Begin with the next stage, in a thread of its own."""
        thread = threading.Thread(target=self._suffer, args=(STAGES[(round_number - 1) % len(STAGES)],))
        thread.start()
        self._threads.append(thread)

    def join(self) -> None:
        """Wait for all."""
        for thread in self._threads:
            thread.join()

    def _suffer(self, stage: str) -> None:
        device_id, credential = self.cloud.enrol(f"victim {stage}")
        with self.cloud.client(credential) as http:
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
            status = self._cut_in_two(f"{path}/parts/adapter_delta", parts["adapter_delta"], http, device_id)
            self._must_refuse(f"{stage}: the rest of the part", status)
        for kind, content in parts.items():
            headers = {"Content-Digest": digest_of(content)}
            status = http.put(f"{path}/parts/{kind}", content=content, headers=headers).status_code
            if stage in STAGES[:2]:
                self._must_refuse(f"{stage}: {kind}", status)
        if stage == STAGES[2]:
            self._revoke(device_id)
        submission = _submission(assignment, parts)
        status = http.post(f"{path}/submission", json=submission).status_code
        if stage != STAGES[3]:
            self._must_refuse(f"{stage}: submission", status)
            return
        self._revoke(device_id)
        self._must_refuse(f"{stage}: again", http.post(f"{path}/submission", json=submission).status_code)

    def _cut_in_two(self, path: str, content: bytes, http: httpx.Client, device_id: str) -> int:
        """Send half a part, have the device revoked, send the rest; return the status."""
        lines = [
            *(f"PUT {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(content)}"),
            *(f"Content-Digest: {digest_of(content)}", f"Authorization: {http.headers['Authorization']}", "", ""),
        ]
        half = len(content) // 2
        with socket.create_connection((HOST, self.cloud.port), timeout=30) as connection:
            connection.sendall("\r\n".join(lines).encode() + content[:half])
            self._revoke(device_id)
            connection.sendall(content[half:])
            answer = b""
            while block := connection.recv(65536):
                answer += block
        return int(answer.split(b" ", 2)[1])

    def _must_refuse(self, what: str, status: int) -> None:
        if status < 400:
            self.admitted_afterwards.append(f"a revoked device, {what}: {status}")


def _submission(assignment: Assignment, parts: dict[str, bytes]) -> dict[str, Any]:
    return {
        "base_sha256": assignment.adapter.sha256 if assignment.adapter else None,
        "num_examples": 8,
        "parts": [
            {"kind": kind, "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
            for kind, content in parts.items()
        ],
        "metrics": {"alignment": ALIGNED},
    }
