"""Requests that a device signs: bound to their method, path, query and body, to a moment, and good once."""

import base64
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.assignments import Assignment
from protocol.errors import ErrorCode
from protocol.headers import content_digest
from protocol.signatures import (
    format_signature,
    request_values,
    signature_base,
    signature_parameters,
    signed_components,
)
from tests.cloud_api.running_api import PROFILE, DeviceClient, RunningApi, delta_for, running_api, settings_in

REDIS = os.environ.get("COTUNE_TEST_REDIS", "redis://127.0.0.1:6379/0")
HEARTBEAT = "/v1/devices/me/heartbeat"


class SigningDevice:
    """An enrolled device with a key, which can sign in wrong ways."""

    def __init__(self, api: RunningApi) -> None:
        self.key = Ed25519PrivateKey.generate()
        public = base64.b64encode(self.key.public_key().public_bytes_raw()).decode()
        body = {"token": api.token(), "name": "signs", "profile": PROFILE, "public_key": public}
        receipt = api.client(None).post("/v1/devices", json=body).json()
        self.device_id, self.credential = receipt["device_id"], receipt["credential"]
        self.http = api.client(self.credential)
        self._count = 0

    def signed(self, method: str, path: str, body: bytes | None, **changed: Any) -> dict[str, str]:
        """The headers for a request; `changed`: what is signed in place of the truth; `fields`: more headers."""
        self._count += 1
        fields = dict(changed.get("fields", {}))
        if body is not None:
            fields["content-digest"] = content_digest(sha256(body).hexdigest())
        bare, _, query = path.partition("?")
        values = request_values(method, bare, query, lambda name: [fields[name]] if name in fields else [])
        components = changed.get("components", signed_components(values))
        parameters = signature_parameters(
            components,
            created=changed.get("created", int(time.time())),
            nonce=changed.get("nonce", f"nonce-{self._count}"),
            keyid=changed.get("keyid", self.device_id),
        )
        values |= changed.get("values", {})
        signature = changed.get("key", self.key).sign(signature_base(components, values, parameters))
        headers = {"Signature-Input": f"cotune={parameters}", "Signature": format_signature(signature)}
        return headers | fields | {"Content-Type": "application/json"}

    def send(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> httpx.Response:
        return self.http.request(method, path, content=body, headers=dict(headers))


@pytest.fixture(scope="module")
def device(api: RunningApi) -> SigningDevice:
    return SigningDevice(api)


def refused(response: httpx.Response) -> ErrorCode:
    assert response.status_code == 401, response.text
    assert response.headers["Date"]
    return ErrorCode(response.json()["code"])


def test_a_signed_request_is_answered_with_and_without_a_body(device: SigningDevice) -> None:
    body = b'{"activity": "idle"}'
    assert device.send("POST", HEARTBEAT, body, device.signed("POST", HEARTBEAT, body)).status_code == 200
    for path in ("/v1/devices/me", "/v1/devices/me/assignment?wait_seconds=0&x=%20a", "/v1/devices/me?"):
        answer = device.send("GET", path, None, device.signed("GET", path, None))
        assert answer.status_code in {200, 204}, answer.text


def test_whoever_has_only_the_credential_can_do_nothing(device: SigningDevice) -> None:
    assert refused(device.http.get("/v1/devices/me")) is ErrorCode.SIGNATURE_REQUIRED
    stranger = Ed25519PrivateKey.generate()
    forged = device.signed("GET", "/v1/devices/me", None, key=stranger)
    assert refused(device.send("GET", "/v1/devices/me", None, forged)) is ErrorCode.SIGNATURE_INVALID
    assert refused(device.http.post("/v1/devices/me/credential")) is ErrorCode.SIGNATURE_REQUIRED
    assert refused(device.http.get(f"/v1/artifacts/{'0' * 64}")) is ErrorCode.SIGNATURE_REQUIRED


@pytest.mark.parametrize(
    "changed",
    [
        {"values": {"@method": "GET"}},
        {"values": {"@path": "/v1/devices/me"}},
        {"values": {"@query": "?wait_seconds=1"}},
        {"values": {"content-digest": content_digest("0" * 64)}},
        {"components": ["@method", "@path", "@query"]},
        {"components": ["@path", "@query", "content-digest"]},
        {"components": []},
        {"keyid": "dev_0"},
    ],
    ids=str,
)
def test_a_signature_over_something_else_is_worth_nothing(device: SigningDevice, changed: dict[str, Any]) -> None:
    headers = device.signed("POST", HEARTBEAT, b"{}", **changed)
    assert refused(device.send("POST", HEARTBEAT, b"{}", headers)) is ErrorCode.SIGNATURE_INVALID


def test_another_body_under_a_good_signature(device: SigningDevice) -> None:
    headers = device.signed("POST", HEARTBEAT, b"{}")
    answer = device.send("POST", HEARTBEAT, b'{"activity": "training"}', headers)
    assert (answer.status_code, answer.json()["code"]) == (422, ErrorCode.DIGEST_MISMATCH)
    for digest in ("sha-256=:x:", "", "sha-512=:AAAA:"):
        answer = device.send("POST", HEARTBEAT, b"{}", headers | {"content-digest": digest})
        assert answer.json()["code"] == ErrorCode.DIGEST_MISMATCH
    bare = device.signed("GET", "/v1/devices/me", None)
    assert refused(device.send("POST", HEARTBEAT, b"{}", bare)) is ErrorCode.SIGNATURE_INVALID


def test_a_request_is_good_once(device: SigningDevice) -> None:
    headers = device.signed("POST", HEARTBEAT, b"{}")
    assert device.send("POST", HEARTBEAT, b"{}", headers).status_code == 200
    assert refused(device.send("POST", HEARTBEAT, b"{}", headers)) is ErrorCode.REQUEST_REPLAYED
    # A request that was refused has not spent the nonce of the real one.
    forged = device.signed("POST", HEARTBEAT, b"{}", nonce="mine", key=Ed25519PrivateKey.generate())
    assert refused(device.send("POST", HEARTBEAT, b"{}", forged)) is ErrorCode.SIGNATURE_INVALID
    assert device.send("POST", HEARTBEAT, b"{}", device.signed("POST", HEARTBEAT, b"{}", nonce="mine")).is_success


@pytest.mark.parametrize(("seconds", "good"), [(-310, False), (-290, True), (290, True), (310, False), (10**9, False)])
def test_the_clock_may_be_off_by_so_much(device: SigningDevice, seconds: int, good: bool) -> None:
    headers = device.signed("GET", "/v1/devices/me", None, created=int(time.time()) + seconds)
    answer = device.send("GET", "/v1/devices/me", None, headers)
    if good:
        assert answer.status_code == 200
        return
    assert refused(answer) is ErrorCode.SIGNATURE_EXPIRED
    assert abs(answer.json()["expected"] - time.time()) < 5  # the server's time


def test_a_long_poll_spends_one_nonce(api: RunningApi) -> None:
    """It looks for work several times under the one signature."""
    device = SigningDevice(api)
    path = "/v1/devices/me/assignment?wait_seconds=20"
    run = api.create_run(device_ids=[device.device_id])
    threading.Timer(0.3, api.prepare, [run]).start()
    assert device.send("GET", path, None, device.signed("GET", path, None)).json()["run_id"] == run.run_id


def test_an_upload_is_bound_to_its_bytes(api: RunningApi) -> None:
    device = SigningDevice(api)
    api.running_run(device)  # type: ignore[arg-type]
    poll = "/v1/devices/me/assignment"
    found = device.send("GET", poll, None, device.signed("GET", poll, None))
    assignment = Assignment.model_validate_json(found.content)
    path = f"/v1/assignments/{assignment.assignment_id}/parts/adapter_delta"
    content, other = delta_for(assignment, fill=1), delta_for(assignment, fill=2)
    wrong = device.send("PUT", path, other, device.signed("PUT", path, content))
    assert (wrong.status_code, wrong.json()["code"]) == (422, ErrorCode.DIGEST_MISMATCH)
    assert not api.stored(other)
    assert device.send("PUT", path, content, device.signed("PUT", path, content)).status_code == 201


def test_where_a_chunk_belongs_and_which_file_it_is_of_is_signed(api: RunningApi) -> None:
    device = SigningDevice(api)
    api.running_run(DeviceClient(device.device_id, device.credential, device.http))
    assignment = Assignment.model_validate_json(
        device.http.get("/v1/devices/me/assignment", headers=device.signed("GET", "/v1/devices/me/assignment", None))
        .raise_for_status()
        .content
    )
    content = delta_for(assignment)
    path = f"/v1/assignments/{assignment.assignment_id}/parts/adapter_delta/uploads"
    digest = content_digest(sha256(content).hexdigest())
    file = {"upload-length": str(len(content)), "repr-digest": digest}
    for name, forged in (("upload-length", str(len(content) + 1)), ("repr-digest", content_digest("0" * 64))):
        headers = device.signed("POST", path, None, fields=file) | {name: forged}
        assert refused(device.send("POST", path, None, headers)) is ErrorCode.SIGNATURE_INVALID
    # Not to sign them is no way round either.
    headers = device.signed("POST", path, None, fields=file, components=["@method", "@path", "@query"])
    assert refused(device.send("POST", path, None, headers)) is ErrorCode.SIGNATURE_INVALID
    begun = device.send("POST", path, None, device.signed("POST", path, None, fields=file))
    assert begun.status_code == 201, begun.text
    path += f"/{begun.json()['upload_id']}"
    headers = device.signed("PATCH", path, content, fields={"upload-offset": "4194304"}) | {"upload-offset": "0"}
    assert refused(device.send("PATCH", path, content, headers)) is ErrorCode.SIGNATURE_INVALID
    added = device.signed("PATCH", path, content) | {"upload-offset": "0"}
    assert refused(device.send("PATCH", path, content, added)) is ErrorCode.SIGNATURE_INVALID
    headers = device.signed("PATCH", path, content, fields={"upload-offset": "0"})
    sent = device.send("PATCH", path, content, headers)
    assert sent.status_code == 200, sent.text
    assert sent.json()["receipt"]["sha256"] == sha256(content).hexdigest()


def test_a_server_may_take_signed_requests_only(tmp_path: Path, migrated_sqlite: Path) -> None:
    shutil.copy(migrated_sqlite, tmp_path / "cotune.sqlite3")
    settings = settings_in(tmp_path)
    with running_api(settings) as api:
        unsigned = api.enrol()
        assert unsigned.http.get("/v1/devices/me").status_code == 200
    with running_api(replace(settings, require_signatures=True)) as api:
        refusal = api.client(unsigned.credential).get("/v1/devices/me")
        assert refused(refusal) is ErrorCode.SIGNATURE_REQUIRED
        assert "enrol again" in refusal.json()["detail"]
        token = api.token()
        body = {"token": token, "name": "x", "profile": PROFILE}
        assert refused(api.client(None).post("/v1/devices", json=body)) is ErrorCode.SIGNATURE_REQUIRED
        assert json.loads(api.operator.get("/v1/enrolment-tokens").content)["items"][0]["used"] == 0
        device = SigningDevice(api)
        assert device.send("GET", "/v1/devices/me", None, device.signed("GET", "/v1/devices/me", None)).is_success


@pytest.mark.services
def test_a_request_that_one_process_answered_is_a_replay_for_another(tmp_path: Path, migrated_sqlite: Path) -> None:
    """Several API processes share their nonces through Redis; without it each knows its own only."""
    broker, prefix = redis.Redis.from_url(REDIS, socket_connect_timeout=1), f"cotune-test-{secrets.token_hex(6)}-"
    try:
        broker.ping()
    except redis.RedisError:
        pytest.skip(f"no Redis answers at {REDIS}")
    shutil.copy(migrated_sqlite, tmp_path / "cotune.sqlite3")
    alone = settings_in(tmp_path)
    shared = replace(alone, broker_url=REDIS, queue_prefix=prefix)
    try:
        for settings, expected in ((shared, 401), (alone, 200)):
            with running_api(settings) as one, running_api(settings) as other:
                device = SigningDevice(one)
                headers = device.signed("POST", HEARTBEAT, b"{}")
                assert device.send("POST", HEARTBEAT, b"{}", headers).status_code == 200
                again = other.client(device.credential).post(HEARTBEAT, content=b"{}", headers=headers)
                assert again.status_code == expected
    finally:
        for key in broker.scan_iter(f"{prefix}*"):
            broker.delete(key)
        broker.close()
