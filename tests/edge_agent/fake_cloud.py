"""A tiny HTTP server that answers as the cloud does, and can be told to fail: cut, hang, truncate, refuse.

For the faults that the real API does not show on demand; `test_real_api.py` runs the agent against the real one.
"""

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from protocol.assignments import ArtifactRef, Assignment
from protocol.headers import CONTENT_DIGEST_HEADER, parse_content_digest

Fault = Callable[["Handler"], None]


@dataclass
class Received:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    time: float


@dataclass
class FakeCloud:
    """What the server holds and what it saw."""

    artifacts: dict[str, bytes] = field(default_factory=dict)
    assignments: list[Assignment] = field(default_factory=list)
    parts: dict[tuple[str, str], bytes] = field(default_factory=dict)
    submissions: dict[str, bytes] = field(default_factory=dict)
    received: list[Received] = field(default_factory=list)
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    url: str = ""

    def add_artifact(self, content: bytes) -> ArtifactRef:
        sha256 = hashlib.sha256(content).hexdigest()
        self.artifacts[sha256] = content
        return ArtifactRef(sha256=sha256, size_bytes=len(content))

    def fail(self, pattern: str, fault: Fault, times: int = 1) -> None:
        """Do `fault` in place of the answer to the next `times` requests whose `METHOD path` matches."""
        self.faults += [(pattern, fault)] * times

    def requests(self, pattern: str) -> list[Received]:
        return [one for one in self.received if re.search(pattern, f"{one.method} {one.path}")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cloud: FakeCloud

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def _serve(self, body: bytes) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.cloud.received.append(Received(self.command, self.path, headers, body, time.monotonic()))
        line = f"{self.command} {self.path}"
        for index, (pattern, fault) in enumerate(self.cloud.faults):
            if re.search(pattern, line):
                del self.cloud.faults[index]
                fault(self)
                return
        self._answer(line, body)

    def _answer(self, line: str, body: bytes) -> None:
        cloud = self.cloud
        now = datetime.now(UTC).isoformat()
        if line.startswith("POST /v1/devices/me/heartbeat"):
            self.send_json(200, {"server_time": now, "next_within_seconds": 30})
        elif line.startswith("POST /v1/devices"):
            self.send_json(201, {"device_id": "dev_1", "credential": "dev_1.secret", "status": "registered"})
        elif line.startswith("GET /v1/devices/me/assignment"):
            open_ones = [one for one in cloud.assignments if one.assignment_id not in cloud.submissions]
            if open_ones:
                self.send_json(200, open_ones[0].model_dump(mode="json"))
            else:
                self.send_response(204)
                self.end_headers()
        elif match := re.fullmatch(r"GET /v1/artifacts/(\w+)", line):
            self.send_artifact(match[1])
        elif match := re.fullmatch(r"PUT /v1/assignments/([^/]+)/parts/(\w+)", line):
            cloud.parts[match[1], match[2]] = body
            sha256 = hashlib.sha256(body).hexdigest()
            assert parse_content_digest(self.headers[CONTENT_DIGEST_HEADER]) == sha256
            receipt = {"assignment_id": match[1], "kind": match[2], "sha256": sha256, "size_bytes": len(body)}
            self.send_json(201, receipt | {"received_at": now})
        elif match := re.fullmatch(r"POST /v1/assignments/([^/]+)/submission", line):
            cloud.submissions[match[1]] = body
            update = hashlib.sha256(body).hexdigest()
            receipt = {"assignment_id": match[1], "round_id": "rnd_1", "update_sha256": update, "received_at": now}
            self.send_json(201, receipt)
        else:
            self.send_json(200, {"status": "accepted"})

    def send_artifact(self, sha256: str, *, cut_after: int | None = None, ignore_range: bool = False) -> None:
        content = self.cloud.artifacts[sha256]
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        offset = int(match[1]) if match and not ignore_range else 0
        self.send_response(206 if offset else 200)
        self.send_header("Content-Length", str(len(content) - offset))
        self.send_header("ETag", f'"{sha256}"')
        self.end_headers()
        self.wfile.write(content[offset:][:cut_after])
        if cut_after is not None:
            self.hang_up()

    def send_json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        pass


def problem(status: int, code: str, detail: str = "as the test wants", **headers: str) -> Fault:
    """Answer with a problem of ours."""
    body = {"type": "about:blank", "title": code, "status": status, "detail": detail, "code": code}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.send_json(status, body, names)


def cut(handler: Handler) -> None:
    """Take the request and hang up without an answer."""
    handler.hang_up()


def truncated(num_bytes: int) -> Fault:
    """Send only the first bytes of an artifact, then hang up."""
    return lambda handler: handler.send_artifact(handler.path.rpartition("/")[2], cut_after=num_bytes)


def ignoring_range(handler: Handler) -> None:
    """Send the whole artifact although a part was asked for."""
    handler.send_artifact(handler.path.rpartition("/")[2], ignore_range=True)


@contextmanager
def running_cloud() -> Iterator[FakeCloud]:
    """Serve on a free port of this machine."""
    cloud = FakeCloud()
    handler = type("BoundHandler", (Handler,), {"cloud": cloud})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    cloud.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield cloud
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
