"""A device that is revoked is out at once: also while it works, and while its bytes are on the way."""

import socket
import time

from protocol.errors import ErrorCode
from tests.cloud_api.running_api import RunningApi, delta_for, digest_header, logits

PATIENCE_SECONDS = 30


def test_revoked_in_the_middle_of_an_upload(api: RunningApi) -> None:
    done, revoked = api.enrol("done"), api.enrol("stolen")
    run = api.running_run(done, revoked, min_updates=1, grace_seconds=60)
    assignment, other = revoked.poll(), done.poll()
    assert assignment is not None
    assert other is not None
    parts = {"adapter_delta": delta_for(other), "logits": logits()}
    for kind, content in parts.items():
        done.upload(other, kind, content)
    assert done.submit(other, parts).status_code == 201
    round_path = f"/v1/runs/{run.run_id}/rounds/1"
    assert api.operator.get(round_path).json()["status"] == "collecting"  # It waits for the other one.

    content = delta_for(assignment, fill=7)
    host, port = api.url.removeprefix("http://").split(":")
    head = "".join(
        f"{name}: {value}\r\n"
        for name, value in {
            "Host": "x",
            "Authorization": f"Bearer {revoked.credential}",
            "Content-Length": str(len(content)),
            "Connection": "close",
            **digest_header(content),
        }.items()
    )
    path = f"/v1/assignments/{assignment.assignment_id}/parts/adapter_delta"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"PUT {path} HTTP/1.1\r\n{head}\r\n".encode() + content[:100])
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not api.cloud.transfers.running:  # The server is reading the body.
            assert time.monotonic() < deadline
            time.sleep(0.01)
        answer = api.operator.post(f"/v1/devices/{revoked.device_id}/revoke").json()
        assert answer["status"] == "revoked"
        connection.sendall(content[100:])
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert b" 403 " in received.splitlines()[0]
    assert ErrorCode.DEVICE_REVOKED.encode() in received

    shown = api.operator.get(round_path).json()
    statuses = {each["device_name"]: (each["status"], each["reason"]) for each in shown["devices"]}
    assert statuses == {"done": ("submitted", None), "stolen": ("lost", "the device was revoked")}
    assert shown["status"] == "aggregating"
    assert api.left_over() == []
