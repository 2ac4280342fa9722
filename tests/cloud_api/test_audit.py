"""Everything that an operator changes is in the audit trail, with how it ended, and no secret with it."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from cloud_api.access import ACCESS
from persistence import runs
from persistence.operator_tables import AuditRow
from protocol.errors import ErrorCode
from protocol.operators import OperatorRole
from tests.cloud_api.running_api import KEY, PROFILE, RunningApi

RUN = {"name": "run", "strategy": {"name": "standalone"}, "rounds": 1}


def pending_device(api: RunningApi) -> str:
    body = {"token": api.token(approval=True), "name": "waits", "profile": PROFILE}
    return str(api.client(None).post("/v1/devices", json=body).json()["device_id"])


def new_token(api: RunningApi) -> str:
    return str(api.operator.post("/v1/enrolment-tokens", json={}).json()["token_id"])


def new_key(api: RunningApi) -> str:
    return str(api.operator.post("/v1/operators/keys", json={"name": "x"}).json()["key_id"])


def new_run(api: RunningApi) -> str:
    return api.create_run(**RUN).run_id


def new_webhook(api: RunningApi) -> str:
    return str(api.operator.post("/v1/webhooks", json={"url": "https://ops.example/"}).json()["webhook_id"])


def running_run(api: RunningApi) -> str:
    return api.running_run(api.enrol()).run_id


def paused_run(api: RunningApi) -> str:
    run_id = running_run(api)
    assert api.operator.post(f"/v1/runs/{run_id}/pause", json={}).status_code == 200
    return run_id


def failed_run(api: RunningApi) -> str:
    run_id = running_run(api)
    with api.cloud.database.transaction() as session:
        runs.fail_run(session, run_id, ErrorCode.TOO_FEW_UPDATES, "nobody came", datetime.now(UTC))
    return run_id


def new_federation(api: RunningApi) -> str:
    name = f"f{uuid4().hex}"
    assert api.operator.post("/v1/federations", json={"name": name}).status_code == 201
    return name


def federation_and_device(api: RunningApi) -> str:
    return f"{new_federation(api)}/{api.enrol().device_id}"


# Operation -> what it is done to (None: it makes something), its body, and the field of the answer that names that.
CALLS: dict[str, tuple[Callable[[RunningApi], str] | None, Any, str]] = {
    "POST /v1/runs/{run_id}/pause": (running_run, {}, "run_id"),
    "POST /v1/runs/{run_id}/resume": (paused_run, None, "run_id"),
    "POST /v1/runs/{run_id}/retry": (failed_run, None, "run_id"),
    "POST /v1/runs/{run_id}/rollback": (running_run, {"version": 0, "reason": "a walk"}, "run_id"),
    "POST /v1/federations": (None, {"name": f"f{uuid4().hex}"}, "name"),
    "PATCH /v1/federations/{federation}": (new_federation, {"description": "north"}, "name"),
    "DELETE /v1/federations/{federation}": (new_federation, None, ""),
    "PUT /v1/federations/{federation}/devices/{device_id}": (federation_and_device, None, ""),
    "DELETE /v1/federations/{federation}/devices/{device_id}": (federation_and_device, None, ""),
    "POST /v1/devices/{device_id}/approve": (pending_device, None, "device_id"),
    "POST /v1/devices/{device_id}/revoke": (lambda api: api.enrol().device_id, None, "device_id"),
    "POST /v1/enrolment-tokens": (None, {"uses": 7}, "token_id"),
    "DELETE /v1/enrolment-tokens/{token_id}": (new_token, None, "token_id"),
    "POST /v1/runs": (None, RUN, "run_id"),
    "POST /v1/runs/{run_id}/stop": (new_run, {}, "run_id"),
    "POST /v1/webhooks": (None, {"url": "https://ops.example/"}, "webhook_id"),
    "POST /v1/webhooks/{webhook_id}/resume": (new_webhook, None, "webhook_id"),
    "DELETE /v1/webhooks/{webhook_id}": (new_webhook, None, "webhook_id"),
    "POST /v1/operators/keys": (None, {"name": "grace", "role": "operator"}, "key_id"),
    "DELETE /v1/operators/keys/{key_id}": (new_key, None, "key_id"),
}


def test_the_walk_leaves_out_nothing_that_changes_something() -> None:
    assert set(CALLS) == {name for name, access in ACCESS.items() if access.action}


@pytest.mark.parametrize("name", CALLS)
def test_what_an_operator_changes_has_an_entry(api: RunningApi, name: str) -> None:
    prepare, body, field = CALLS[name]
    method, path = name.split()
    subject = prepare(api) if prepare else None
    for each in (subject or "").split("/"):
        path = re.sub(r"\{\w+\}", each, path, count=1)
    answer = api.operator.request(method, path, json=body, headers={"X-Request-ID": "walk-1"})
    assert answer.status_code in {200, 201, 204}, answer.text
    [entry] = api.operator.get("/v1/audit", params={"limit": 1}).json()["items"]
    assert (entry["key_id"], entry["name"], entry["request_id"]) == ("bootstrap", "bootstrap", "walk-1")
    assert (entry["action"], entry["outcome"]) == (ACCESS[name].action, "done")
    assert entry["subject"] == (answer.json()[field] if field else subject) == (subject or entry["subject"])


def test_what_was_refused_has_an_entry_too(api: RunningApi) -> None:
    viewer = api.client(api.operator_key(OperatorRole.VIEWER))
    viewer_id = api.operator.get("/v1/operators/keys").json()["items"][-1]["key_id"]
    run_id = new_run(api)
    assert viewer.post(f"/v1/runs/{run_id}/stop", json={}).status_code == 403
    assert api.operator.post("/v1/runs/run_0/stop", json={}).status_code == 404
    assert api.operator.post("/v1/runs", json={"name": ""}).status_code == 422  # Nothing was attempted.
    newest = api.operator.get("/v1/audit", params={"limit": 2}).json()["items"]
    assert [(entry["key_id"], entry["subject"], entry["outcome"]) for entry in newest] == [
        ("bootstrap", "run_0", "run_not_found"),
        (viewer_id, run_id, "forbidden"),
    ]
    filtered = api.operator.get("/v1/audit", params={"key_id": viewer_id}).json()["items"]
    assert [entry["action"] for entry in filtered] == ["run.stop"]


def test_reading_leaves_no_entry_and_neither_does_a_device(api: RunningApi) -> None:
    before = api.operator.get("/v1/audit").json()["items"][0]["sequence"]
    device = api.enrol()  # The token is the operator's deed, the enrolment the device's.
    device.http.post("/v1/devices/me/heartbeat", json={})
    api.operator.get("/v1/runs")
    newest = api.operator.get("/v1/audit").json()["items"][0]
    assert (newest["sequence"], newest["action"]) == (before + 1, "enrolment_token.create")


def test_what_cannot_be_recorded_is_not_done(fresh_api: RunningApi) -> None:
    def fail(_mapper: object, _connection: object, _row: AuditRow) -> None:
        raise RuntimeError("the trail is full")

    event.listen(AuditRow, "before_insert", fail)
    try:
        assert fresh_api.operator.post("/v1/enrolment-tokens", json={}).status_code == 500
    finally:
        event.remove(AuditRow, "before_insert", fail)
    assert fresh_api.operator.get("/v1/enrolment-tokens").json()["items"] == []


def test_what_is_not_committed_is_not_recorded(fresh_api: RunningApi) -> None:
    def fail(_session: Session) -> None:
        raise RuntimeError("no room")

    event.listen(Session, "before_commit", fail)
    try:
        assert fresh_api.operator.post("/v1/enrolment-tokens", json={}).status_code == 500
    finally:
        event.remove(Session, "before_commit", fail)
    assert fresh_api.operator.get("/v1/audit").json()["items"] == []


def test_no_secret_is_in_the_trail(fresh_api: RunningApi) -> None:
    token, key = fresh_api.token(), fresh_api.operator_key(OperatorRole.ADMIN)
    trail = fresh_api.operator.get("/v1/audit").text
    assert '"enrolment_token.create"' in trail
    assert not [secret for secret in (token, key, key[12:], KEY) if secret in trail]
