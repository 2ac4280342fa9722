"""Pause, resume, retry, rollback and federations, as operators call them."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from persistence import jobs, runs
from protocol.errors import ErrorCode
from protocol.runs import Run
from tests.cloud_api.running_api import RunningApi, delta_for, logits


def refused(response: httpx.Response, code: ErrorCode, status: int) -> None:
    assert (response.json()["code"], response.status_code) == (code.value, status), response.text


def move(api: RunningApi, run: Run, name: str, **body: Any) -> httpx.Response:
    return api.operator.post(f"/v1/runs/{run.run_id}/{name}", **({"json": body} if body else {}))


def fail(api: RunningApi, run: Run) -> None:
    with api.cloud.database.transaction() as session:
        runs.fail_run(session, run.run_id, ErrorCode.JOB_FAILED, "no memory", datetime.now(UTC))


def test_a_run_is_paused_shown_and_resumed(api: RunningApi) -> None:
    device = api.enrol("one")
    run = api.running_run(device)
    paused = move(api, run, "pause", reason="the worker is needed").json()
    assert (paused["status"], paused["status_reason"]) == ("paused", "the worker is needed")
    assert (paused["waiting"]["for"], paused["waiting"]["by"]) == ("operator", "an operator")
    assert move(api, run, "pause").json() == paused
    assert api.operator.get(f"/v1/runs/{run.run_id}").json() == paused
    assert device.poll() is None
    resumed = move(api, run, "resume").json()
    assert (resumed["status"], resumed["waiting"]["for"]) == ("running", "devices")
    assert resumed["waiting"]["until"] > resumed["waiting"]["since"]
    assert device.poll() is not None


def test_a_resumed_run_answers_a_device_that_waits_for_work(api: RunningApi) -> None:
    device = api.enrol("one")
    run = api.running_run(device)
    move(api, run, "pause")
    with ThreadPoolExecutor(1) as threads:
        polled = threads.submit(device.poll, 20)
        move(api, run, "resume")
        assignment = polled.result(10)
    assert assignment is not None
    assert assignment.run_id == run.run_id


def test_a_failed_run_is_retried_and_its_round_has_two_attempts(api: RunningApi) -> None:
    device = api.enrol("one")
    run = api.running_run(device)
    refused(move(api, run, "retry"), ErrorCode.ILLEGAL_TRANSITION, 409)
    fail(api, run)
    retried = move(api, run, "retry").json()
    assert (retried["status"], retried["error_code"]) == ("running", None)
    path = f"/v1/runs/{run.run_id}/rounds"
    assert [each["attempt"] for each in api.operator.get(path).json()["items"]] == [2, 1]
    assert api.operator.get(f"{path}/1").json()["status"] == "open"
    assert api.operator.get(f"{path}/1", params={"attempt": 1}).json()["status"] == "failed"
    refused(api.operator.get(f"{path}/1", params={"attempt": 3}), ErrorCode.ROUND_NOT_FOUND, 404)


def test_where_a_rollback_may_not_go(api: RunningApi) -> None:
    run = api.running_run(api.enrol("one"))
    refused(move(api, run, "rollback"), ErrorCode.INVALID_FIELD, 422)
    refused(move(api, run, "rollback", version=1), ErrorCode.VERSION_NOT_FOUND, 404)
    assert move(api, run, "rollback", version=0, reason="to where it is").json()["latest_version"] == 0
    move(api, run, "stop")
    refused(move(api, run, "rollback", version=0), ErrorCode.ILLEGAL_TRANSITION, 409)
    for name in ("pause", "resume", "retry"):
        refused(api.operator.post(f"/v1/runs/run_0/{name}"), ErrorCode.RUN_NOT_FOUND, 404)


def test_a_device_may_not_move_a_run(api: RunningApi) -> None:
    device = api.enrol("one")
    run = api.running_run(device)
    for name in ("pause", "resume", "retry", "rollback"):
        refused(device.http.post(f"/v1/runs/{run.run_id}/{name}"), ErrorCode.FORBIDDEN, 403)


@pytest.mark.parametrize(("policy", "told"), [("next_round", "later_round"), ("keep", "no_round"), ("discard", None)])
def test_the_receipt_of_a_late_update_says_what_becomes_of_it(api: RunningApi, policy: str, told: str | None) -> None:
    quick, slow = api.enrol("quick"), api.enrol("slow")
    run = api.running_run(quick, slow, late_updates=policy, rounds=2)
    late, fresh = slow.poll(), quick.poll()
    assert late is not None
    assert fresh is not None
    for device, assignment in ((quick, fresh), (slow, late)):
        parts = {"adapter_delta": delta_for(assignment, fill=1), "logits": logits(1)}
        uploads = [device.upload(assignment, kind, content) for kind, content in parts.items()]
        receipt = device.submit(assignment, parts)
        if device is quick:
            assert receipt.json()["counts_in"] == "this_round"
        elif told is None:
            refused(uploads[0], ErrorCode.ROUND_CLOSED, 409)
            refused(receipt, ErrorCode.ROUND_CLOSED, 409)
        else:
            assert (receipt.status_code, receipt.json()["counts_in"]) == (201, told)
            assert slow.submit(assignment, parts).json() == receipt.json()
    devices = api.operator.get(f"/v1/runs/{run.run_id}/rounds/1").json()["devices"]
    assert [(each["status"], each["late"]) for each in devices] == [("submitted", False), ("late", told is not None)]


def test_federations_and_their_filters(fresh_api: RunningApi) -> None:
    api = fresh_api
    made = api.operator.post("/v1/federations", json={"name": "north", "description": "cold"})
    assert (made.status_code, made.json()["num_devices"]) == (201, 0)
    refused(api.operator.post("/v1/federations", json={"name": "north"}), ErrorCode.NAME_TAKEN, 409)
    refused(api.operator.post("/v1/federations", json={"name": "No Spaces"}), ErrorCode.INVALID_FIELD, 422)
    device, other = api.enrol("one"), api.enrol("two")
    path = "/v1/federations/north"
    assert api.operator.put(f"{path}/devices/{device.device_id}").json()["num_devices"] == 1
    assert api.operator.patch(path, json={"description": "colder"}).json()["description"] == "colder"
    run = api.create_run(federation="north")
    api.create_run()
    api.prepare(run)
    assert [other.poll(), getattr(device.poll(), "run_id", None)] == [None, run.run_id]
    for kind, expected in (("runs", [run.run_id]), ("devices", [device.device_id])):
        found = api.operator.get(f"/v1/{kind}", params={"federation": "north"}).json()["items"]
        assert [each[f"{kind[:-1]}_id"] for each in found] == expected
    assert device.http.get("/v1/devices/me").json()["federations"] == ["default", "north"]
    refused(api.operator.delete(path), ErrorCode.CONFLICT, 409)
    assert api.operator.delete(f"{path}/devices/{device.device_id}").json()["num_devices"] == 0
    names = [each["name"] for each in api.operator.get("/v1/federations").json()["items"]]
    assert names == ["default", "north"]
    api.operator.post("/v1/federations", json={"name": "empty"})
    assert api.operator.delete("/v1/federations/empty").status_code == 204
    refused(api.operator.get("/v1/federations/empty"), ErrorCode.FEDERATION_NOT_FOUND, 404)
    unknown = api.operator.post("/v1/enrolment-tokens", json={"federations": ["nowhere"]})
    refused(unknown, ErrorCode.FEDERATION_NOT_FOUND, 404)


def test_a_worker_that_is_gone_is_shown_as_gone(api: RunningApi) -> None:
    run = api.create_run()
    with api.cloud.database.transaction() as session:
        waiting = [each.job_id for each in jobs.due_for_sending(session, datetime.now(UTC), 0)]
        for job_id in waiting:
            jobs.claim(session, job_id, "gone", -1, datetime.now(UTC))
    shown = api.operator.get(f"/v1/runs/{run.run_id}").json()
    assert shown["waiting"]["for"] == "lost_worker"
    assert "the lease of gone ran out" in shown["status_reason"]
