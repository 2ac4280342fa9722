"""A POST with an `Idempotency-Key` that comes again: done once, answered alike."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
from fastapi.routing import APIRoute
from sqlalchemy import func, select

from cloud_api.app import SUBJECTS
from persistence.idempotency import KEPT, forget_old
from persistence.operator_tables import IdempotentAnswerRow
from persistence.tables import DeviceRow, EnrolmentTokenRow, RunRow
from protocol.headers import IDEMPOTENCY_KEY_HEADER, IDEMPOTENCY_REPLAYED_HEADER
from tests.cloud_api.running_api import PROFILE, RunningApi

RUN = {"name": "again", "strategy": {"name": "standalone"}, "rounds": 1}


def post(client: httpx.Client, path: str, body: dict[str, Any], key: str) -> httpx.Response:
    return client.post(path, json=body, headers={IDEMPOTENCY_KEY_HEADER: key})


def count(api: RunningApi, column: Any, *where: Any) -> int:
    with api.cloud.database.reading() as session:
        return session.scalar(select(func.count()).select_from(column).where(*where)) or 0


def test_every_post_takes_the_key() -> None:
    posts = [route for each in SUBJECTS for route in each.router.routes if "POST" in getattr(route, "methods", ())]
    assert len(posts) >= 7
    for route in posts:
        assert isinstance(route, APIRoute)
        if hasattr(route.endpoint, "repeats_by_content"):
            continue
        names = {field.alias for each in route.dependant.dependencies for field in each.header_params}
        assert IDEMPOTENCY_KEY_HEADER in names, route.path


def test_the_same_request_again_gets_the_same_answer_and_nothing_is_done(api: RunningApi) -> None:
    key, body = str(uuid4()), RUN | {"name": f"once-{uuid4().hex[:8]}"}
    first, second = (post(api.operator, "/v1/runs", body, key) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json()
    assert IDEMPOTENCY_REPLAYED_HEADER not in first.headers
    assert second.headers[IDEMPOTENCY_REPLAYED_HEADER] == "true"
    assert count(api, RunRow, RunRow.name == body["name"]) == 1


def test_a_repetition_is_no_second_deed_in_the_audit_trail(fresh_api: RunningApi) -> None:
    for _ in range(3):
        assert post(fresh_api.operator, "/v1/runs", RUN, "one-key").status_code == 201
    entries = fresh_api.operator.get("/v1/audit").json()["items"]
    assert [entry["action"] for entry in entries] == ["run.create"]


def test_an_answer_of_200_stays_one(api: RunningApi) -> None:
    run = api.operator.post("/v1/runs", json=RUN).json()
    key = str(uuid4())
    first, second = (post(api.operator, f"/v1/runs/{run['run_id']}/stop", {}, key) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200)
    assert second.json() == first.json()


def test_another_request_with_the_key_is_a_conflict(api: RunningApi) -> None:
    key = str(uuid4())
    assert post(api.operator, "/v1/runs", RUN, key).status_code == 201
    for path, body in (("/v1/runs", RUN | {"rounds": 2}), ("/v1/runs?a=b", RUN), ("/v1/enrolment-tokens", {"uses": 1})):
        refused = post(api.operator, path, body, key)
        assert refused.status_code == 409, path
        assert refused.json()["code"] == "idempotency_key_reused"


def test_two_callers_may_choose_the_same_key(api: RunningApi) -> None:
    key = str(uuid4())
    one, other = api.enrol("one"), api.enrol("other")
    for device in (one, other):
        answer = post(device.http, "/v1/devices/me/heartbeat", {"activity": "idle"}, key)
        assert answer.status_code == 200, answer.text
        assert IDEMPOTENCY_REPLAYED_HEADER not in answer.headers


def test_a_refused_request_leaves_the_key_free(api: RunningApi) -> None:
    key = str(uuid4())
    refused = post(api.operator, "/v1/runs", RUN | {"device_ids": ["dev_nobody"]}, key)
    assert refused.status_code == 404
    assert post(api.operator, "/v1/runs", RUN, key).status_code == 201


def test_a_key_that_is_not_one_is_refused(api: RunningApi) -> None:
    for key in ("", "two words", "x" * 256):
        answer = post(api.operator, "/v1/runs", RUN, key)
        assert answer.status_code == 422, key
        assert answer.json()["errors"][0]["field"] == IDEMPOTENCY_KEY_HEADER


def test_a_device_enrols_once_and_its_credential_is_not_in_the_database(api: RunningApi) -> None:
    key, name = str(uuid4()), f"phone-{uuid4().hex[:8]}"
    body = {"token": api.token(), "name": name, "profile": PROFILE}
    client = api.client(None)
    first, second = (post(client, "/v1/devices", body, key) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json()
    assert count(api, DeviceRow, DeviceRow.name == name) == 1
    secret = first.json()["credential"].partition(".")[2]
    assert api.client(first.json()["credential"]).get("/v1/devices/me").status_code == 200
    with api.cloud.database.reading() as session:
        for sealed in session.scalars(select(IdempotentAnswerRow.sealed_answer)):
            assert sealed is not None
            assert secret.encode() not in sealed
            assert body["token"].encode() not in sealed


def test_requests_at_the_same_time_do_it_once(api: RunningApi) -> None:
    key, body = str(uuid4()), {"uses": 3, "note": f"at once {uuid4().hex}"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(api.operator, "/v1/enrolment-tokens", body, key), range(8)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert sum(IDEMPOTENCY_REPLAYED_HEADER in answer.headers for answer in answers) == 7
    assert count(api, EnrolmentTokenRow, EnrolmentTokenRow.note == body["note"]) == 1


def test_answers_are_forgotten_after_a_day(fresh_api: RunningApi) -> None:
    assert post(fresh_api.operator, "/v1/runs", RUN, "monday").status_code == 201
    now = datetime.now(UTC)
    with fresh_api.cloud.database.transaction() as session:
        assert forget_old(session, now + KEPT - timedelta(minutes=1)) == 0
    with fresh_api.cloud.database.transaction() as session:
        assert forget_old(session, now + KEPT + timedelta(minutes=1)) == 1
    assert post(fresh_api.operator, "/v1/runs", RUN | {"rounds": 2}, "monday").status_code == 201


def test_a_refusal_that_is_kept_leaves_the_key_free(api: RunningApi) -> None:
    """`late` is committed with the refusal; the same submission again is refused in the same words, not by a fault."""
    device = api.enrol()
    run = api.running_run(device, strategy={"name": "standalone"})
    assignment = device.poll()
    assert assignment is not None
    api.operator.post(f"/v1/runs/{run.run_id}/stop")
    path = f"/v1/assignments/{assignment.assignment_id}/submission"
    base = assignment.adapter.sha256 if assignment.adapter else None
    body = {"base_sha256": base, "num_examples": 1, "parts": [], "metrics": {}}
    refusals = [post(device.http, path, body, "one-submission") for _ in range(3)]
    assert [(each.status_code, each.json()["code"]) for each in refusals] == [(409, "round_closed")] * 3
    assert count(api, IdempotentAnswerRow, IdempotentAnswerRow.status.is_(None)) == 0


def test_a_slow_body_is_waited_for_outside_of_any_transaction(api: RunningApi) -> None:
    device = api.enrol()
    host, port = api.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/devices/me/credential HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {device.credential}\r\n"
        f"{IDEMPOTENCY_KEY_HEADER}: slow\r\nContent-Length: 10\r\n\r\n12345"
    )
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(head.encode())
        time.sleep(0.2)
        started = time.monotonic()
        assert post(api.operator, "/v1/runs", RUN, str(uuid4())).status_code == 201
        assert time.monotonic() - started < 5
        slow.sendall(b"67890")
        assert slow.recv(100).startswith(b"HTTP/1.1 201")
