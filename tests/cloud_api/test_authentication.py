"""Who may call what."""

import httpx
import pytest

from protocol.errors import ErrorCode
from tests.cloud_api.running_api import KEY, PROFILE, DeviceClient, RunningApi, delta_for

OPERATOR_CALLS = [
    ("POST", "/v1/enrolment-tokens"),
    ("GET", "/v1/devices"),
    ("GET", "/v1/devices/dev_0"),
    ("POST", "/v1/devices/dev_0/revoke"),
    ("POST", "/v1/runs"),
    ("GET", "/v1/runs"),
    ("GET", "/v1/runs/run_0"),
    ("POST", "/v1/runs/run_0/stop"),
    ("GET", "/v1/runs/run_0/traffic"),
    ("GET", "/v1/runs/run_0/rounds"),
    ("GET", "/v1/runs/run_0/rounds/1"),
    ("GET", "/v1/runs/run_0/events"),
    ("GET", "/v1/runs/run_0/events/stream"),
    ("GET", "/v1/runs/run_0/versions"),
    ("GET", "/v1/runs/run_0/versions/0"),
    ("GET", "/v1/runs/run_0/versions/0/adapters/proxy"),
]
DEVICE_CALLS = [
    ("GET", "/v1/devices/me"),
    ("POST", "/v1/devices/me/heartbeat"),
    ("GET", "/v1/devices/me/assignment"),
    ("POST", "/v1/assignments/asg_0/progress"),
    ("POST", "/v1/assignments/asg_0/refusal"),
    ("PUT", "/v1/assignments/asg_0/parts/logits"),
    ("POST", "/v1/assignments/asg_0/submission"),
]
SHARED_CALLS = [("GET", f"/v1/artifacts/{'0' * 64}"), ("HEAD", f"/v1/artifacts/{'0' * 64}")]


@pytest.fixture(scope="module")
def device(api: RunningApi) -> DeviceClient:
    return api.enrol()


def code_of(response: httpx.Response) -> str:
    assert response.headers["Content-Type"] == "application/problem+json", response.text
    return str(response.json()["code"])


@pytest.mark.parametrize(("method", "path"), OPERATOR_CALLS + DEVICE_CALLS + SHARED_CALLS)
@pytest.mark.parametrize(
    "authorization", [None, "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer", "Bearer dev_0.x", "Bearer \xff"]
)
def test_without_a_valid_credential(api: RunningApi, method: str, path: str, authorization: str | None) -> None:
    headers = {"Authorization": authorization.encode("latin-1")} if authorization else {}
    response = api.client(None).request(method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    if method != "HEAD":
        assert code_of(response) == ErrorCode.UNAUTHENTICATED


@pytest.mark.parametrize(("method", "path"), OPERATOR_CALLS)
def test_a_device_may_not_call_what_is_the_operators(device: DeviceClient, method: str, path: str) -> None:
    response = device.http.request(method, path)
    assert (response.status_code, code_of(response)) == (403, ErrorCode.FORBIDDEN)


@pytest.mark.parametrize(("method", "path"), DEVICE_CALLS)
def test_an_operator_is_no_device(api: RunningApi, method: str, path: str) -> None:
    response = api.operator.request(method, path)
    assert (response.status_code, code_of(response)) == (403, ErrorCode.FORBIDDEN)


def test_a_revoked_device_is_refused_at_once_also_in_the_middle_of_a_round(api: RunningApi) -> None:
    device = api.enrol("stolen")
    api.running_run(device)
    assignment = device.poll()
    assert assignment is not None
    assert api.operator.post(f"/v1/devices/{device.device_id}/revoke").json()["status"] == "revoked"
    calls = [
        device.http.get("/v1/devices/me"),
        device.http.get("/v1/devices/me/assignment"),
        device.upload(assignment, "adapter_delta", delta_for(assignment)),
        device.submit(assignment, {}),
        device.http.get("/v1/runs"),
    ]
    assert {(each.status_code, code_of(each)) for each in calls} == {(403, "device_revoked")}


def test_enrolment_tokens_are_good_once_and_unknown_ones_never(api: RunningApi) -> None:
    token = api.token()
    http = api.client(None)
    body = {"token": token, "name": "one", "profile": PROFILE}
    receipt = http.post("/v1/devices", json=body)
    assert receipt.status_code == 201
    assert receipt.json()["credential"].startswith(receipt.json()["device_id"] + ".")
    again = http.post("/v1/devices", json=body | {"name": "two"})
    assert (again.status_code, code_of(again)) == (409, ErrorCode.ENROLMENT_TOKEN_USED)
    unknown = http.post("/v1/devices", json=body | {"token": "no-such-token"})
    assert (unknown.status_code, code_of(unknown)) == (401, ErrorCode.ENROLMENT_TOKEN_UNKNOWN)


def test_a_device_fetches_what_its_runs_gave_it_and_nothing_else(api: RunningApi, device: DeviceClient) -> None:
    run = api.running_run(device)
    assignment = device.poll()
    assert assignment is not None
    for given in (assignment.proxy_manifest, assignment.adapter, assignment.probe_set):
        assert given is not None
        response = device.http.get(f"/v1/artifacts/{given.sha256}")
        assert (response.status_code, len(response.content)) == (200, given.size_bytes)
    stranger = api.enrol("stranger")
    assert assignment.adapter is not None
    assert stranger.http.get(f"/v1/artifacts/{assignment.adapter.sha256}").status_code == 404
    version = api.operator.get(f"/v1/runs/{run.run_id}/versions/0").json()
    llm_adapter = f"/v1/artifacts/{version['llm_adapter_sha256']}"
    assert device.http.get(llm_adapter).status_code == 404
    assert api.operator.get(llm_adapter).status_code == 200
