"""Who may call what."""

import re

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.requests import Request

from cloud_api.access import ACCESS, access_of
from cloud_api.app import SUBJECTS
from protocol.errors import ErrorCode
from protocol.operators import OperatorRole
from tests.cloud_api.running_api import KEY, PROFILE, DeviceClient, RunningApi, delta_for

VALUES = {"assignment_id": "asg_0", "kind": "logits", "sha256": "0" * 64, "number": "0", "adapter": "proxy"}


def calls(*wanted: tuple[OperatorRole | None, bool]) -> list[tuple[str, str]]:
    """The operations with such an access."""
    return [call_of(name) for name, access in ACCESS.items() if (access.role, access.devices) in wanted]


def call_of(name: str) -> tuple[str, str]:
    """Method and path of an operation, with ids that name nothing."""
    method, path = name.split()
    return method, re.sub(r"\{(\w+)\}", lambda found: VALUES.get(found[1], "x_0"), path)


OPERATOR_CALLS = calls(*((role, False) for role in OperatorRole))
DEVICE_CALLS = calls((None, True))
SHARED_CALLS = calls((OperatorRole.VIEWER, True))


def test_every_operation_says_who_may_call_it() -> None:
    routes = [route for subject in SUBJECTS for route in subject.router.routes if isinstance(route, APIRoute)]
    served = {f"{method} {route.path}" for route in routes for method in route.methods}
    assert served == set(ACCESS)
    probes = [("GET", "/health"), ("GET", "/metrics"), ("GET", "/ready")]
    assert sorted(calls((None, False))) == [*probes, ("POST", "/v1/devices")]
    for name, access in ACCESS.items():
        changes = not name.startswith(("GET ", "HEAD "))
        assert (access.action is not None) == (changes and access.role is not None), name
    actions = [access.action for access in ACCESS.values() if access.action]
    assert len(set(actions)) == len(actions)


def test_what_is_not_listed_is_for_admins() -> None:
    scope = {"type": "http", "method": "POST", "path": "/v1/new", "headers": []}
    for found in (scope, scope | {"route": APIRoute("/v1/new", lambda: None)}):
        access = access_of(Request(found))
        assert (access.role, access.devices) == (OperatorRole.ADMIN, False)
        assert access.action


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
    headers = {"Upload-Offset": b"0"}
    if authorization:
        headers["Authorization"] = authorization.encode("latin-1")
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
    response = api.operator.request(method, path, headers={"Upload-Offset": "0"})
    assert (response.status_code, code_of(response)) == (403, ErrorCode.FORBIDDEN)


@pytest.mark.parametrize("role", OperatorRole)
def test_a_role_may_do_what_its_rank_allows_and_no_more(api: RunningApi, role: OperatorRole) -> None:
    http = api.client(api.operator_key(role))
    for name, access in ACCESS.items():
        if access.role is None:
            continue
        response = http.request(*call_of(name))
        if role.includes(access.role):
            assert response.status_code in {200, 201, 404, 422}, f"{role} {name}: {response.text}"
        else:
            assert (response.status_code, code_of(response)) == (403, ErrorCode.FORBIDDEN), name
            assert (response.json()["expected"], response.json()["received"]) == (access.role, role)


def test_an_operators_key_is_no_devices_credential(api: RunningApi) -> None:
    for role in OperatorRole:
        response = api.client(api.operator_key(role)).get("/v1/devices/me")
        assert (response.status_code, code_of(response)) == (403, ErrorCode.FORBIDDEN)


def test_a_key_that_is_revoked_or_over_is_refused_at_once(fresh_api: RunningApi) -> None:
    admin = fresh_api.client(fresh_api.operator_key(OperatorRole.ADMIN))
    created = admin.post("/v1/operators/keys", json={"name": "dashboard"}).json()
    assert (created["role"], created["created_by"].startswith("key_")) == ("viewer", True)
    viewer = fresh_api.client(created["key"])
    assert viewer.get("/v1/runs").status_code == 200
    revoked = admin.delete(f"/v1/operators/keys/{created['key_id']}")
    assert revoked.json()["revoked_at"]
    assert created["key"] not in revoked.text + admin.get("/v1/operators/keys").text
    refused = viewer.get("/v1/runs")
    assert (refused.status_code, code_of(refused)) == (401, ErrorCode.UNAUTHENTICATED)
    assert "was revoked" in refused.json()["detail"]
    assert created["key"] not in refused.text


def test_a_stream_ends_when_its_key_is_revoked(fresh_api: RunningApi) -> None:
    key = fresh_api.operator_key(OperatorRole.VIEWER)
    key_id = fresh_api.operator.get("/v1/operators/keys").json()["items"][0]["key_id"]
    run = fresh_api.create_run()
    with fresh_api.client(key).stream("GET", f"/v1/runs/{run.run_id}/events/stream") as stream:
        lines = stream.iter_lines()
        assert any("run.created" in line for line in lines)
        fresh_api.operator.delete(f"/v1/operators/keys/{key_id}")
        fresh_api.operator.post(f"/v1/runs/{run.run_id}/stop", json={"reason": "not for your eyes"})
        assert "not for your eyes" not in "".join(lines)


def test_a_revoked_device_is_refused_at_once_also_in_the_middle_of_a_round(api: RunningApi) -> None:
    device = api.enrol("stolen")
    api.running_run(device)
    assignment = device.poll()
    assert assignment is not None
    assert api.operator.post(f"/v1/devices/{device.device_id}/revoke").json()["status"] == "revoked"
    answers = [
        device.http.get("/v1/devices/me"),
        device.http.get("/v1/devices/me/assignment"),
        device.upload(assignment, "adapter_delta", delta_for(assignment)),
        device.submit(assignment, {}),
        device.http.get("/v1/runs"),
    ]
    assert {(each.status_code, code_of(each)) for each in answers} == {(403, "device_revoked")}


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
