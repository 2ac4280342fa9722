"""Asking for work: at once, by long poll, and when the server stops."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from persistence import assignments
from protocol.assignments import Assignment
from protocol.errors import ErrorCode
from tests.cloud_api.running_api import DeviceClient, RunningApi, raw_request, running_api, settings_in


@pytest.fixture(scope="module")
def device(api: RunningApi) -> DeviceClient:
    return api.enrol()


def test_without_work_the_answer_is_204(device: DeviceClient) -> None:
    response = device.http.get("/v1/devices/me/assignment")
    assert (response.status_code, response.content) == (204, b"")


def test_a_wait_that_is_too_long_is_refused(device: DeviceClient) -> None:
    response = device.http.get("/v1/devices/me/assignment", params={"wait_seconds": 31})
    assert (response.status_code, response.json()["code"]) == (422, ErrorCode.INVALID_FIELD)


def test_a_wait_without_work_ends_in_time(device: DeviceClient) -> None:
    started = time.monotonic()
    assert device.poll(wait_seconds=1) is None
    assert 0.9 < time.monotonic() - started < 5


def test_asking_twice_gives_the_same_assignment(api: RunningApi) -> None:
    device = api.enrol()
    run = api.running_run(device)
    first = device.poll()
    assert first is not None
    assert (first.run_id, first.round_number, first.status) == (run.run_id, 1, "offered")
    assert device.poll() == first


def test_a_waiting_device_is_woken_when_a_round_opens(api: RunningApi) -> None:
    devices = [api.enrol(f"waiting-{index}") for index in range(3)]
    run = api.create_run(device_ids=[device.device_id for device in devices])
    with ThreadPoolExecutor(3) as threads:
        polls = [threads.submit(device.poll, 20) for device in devices]
        time.sleep(0.3)
        assert not any(poll.done() for poll in polls)
        opened = time.monotonic()
        api.prepare(run)  # past this process's endpoints: as a worker in another process commits
        given = [poll.result() for poll in polls]
    assert time.monotonic() - opened < 5
    assert {assignment.run_id for assignment in given if assignment} == {run.run_id}
    assert len({assignment.assignment_id for assignment in given if assignment}) == 3


def test_who_waits_holds_no_connection_of_the_database(api: RunningApi) -> None:
    devices = [api.enrol(f"many-{index}") for index in range(8)]
    with ThreadPoolExecutor(8) as threads:
        polls = [threads.submit(device.poll, 2) for device in devices]
        time.sleep(1)
        pool = api.cloud.database.engine.pool
        samples = []
        for _ in range(50):
            samples.append(pool.checkedout())  # type: ignore[attr-defined]
            time.sleep(0.005)
        assert min(samples) == 0
        assert [poll.result() for poll in polls] == [None] * 8


def test_more_requests_at_once_than_connections(api: RunningApi) -> None:
    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(lambda _: api.operator.post("/v1/enrolment-tokens", json={}), range(120)))
    assert {answer.status_code for answer in answers} == {201}


def test_a_device_that_hung_up_is_offered_nothing(api: RunningApi) -> None:
    device = api.enrol("gone")
    run = api.create_run(device_ids=[device.device_id])
    head = "GET /v1/devices/me/assignment?wait_seconds=20 HTTP/1.1\r\nHost: x\r\n"
    head += f"Authorization: Bearer {device.credential}\r\n\r\n"
    raw_request(api.url, head.encode(), close=True)
    time.sleep(0.2)
    api.prepare(run)
    time.sleep(0.3)
    with api.cloud.database.reading() as session:
        assert assignments.work_waits(session, device.device_id, datetime.now(UTC))
    shown = api.operator.get(f"/v1/runs/{run.run_id}/rounds/1").json()
    assert shown["devices"] == []


def test_progress_moves_forward_only_and_losses_are_shown(api: RunningApi) -> None:
    device = api.enrol()
    run = api.running_run(device)
    assignment = device.poll()
    assert assignment is not None
    path = f"/v1/assignments/{assignment.assignment_id}/progress"
    training = {"status": "training", "stage": "mutual_learning", "step": 3, "steps": 9, "losses": {"slm_ce": 1.5}}
    assert device.http.post(path, json=training).json() == {"status": "training"}
    assert device.http.post(path, json={"status": "accepted"}).json() == {"status": "training"}
    backwards = device.http.post(path, json={"status": "counted"})
    assert (backwards.status_code, backwards.json()["code"]) == (422, ErrorCode.INVALID_FIELD)
    device.http.post(path, json=training)
    shown = api.operator.get(f"/v1/runs/{run.run_id}/rounds/1").json()["devices"][0]
    assert (shown["step"], shown["steps"], shown["losses"]) == (3, 9, {"slm_ce": 1.5})
    assert api.operator.get(f"/v1/runs/{run.run_id}/traffic").json()["up"]["metrics"] > 0


def test_a_refusal_is_told_to_the_operator(api: RunningApi) -> None:
    device = api.enrol()
    run = api.running_run(device)
    assignment = device.poll()
    assert assignment is not None
    path = f"/v1/assignments/{assignment.assignment_id}/refusal"
    body = {"reason": "expected 2 GiB, got 1", "code": "out_of_memory"}
    assert device.http.post(path, json=body).json() == {"status": "rejected"}
    assert device.http.post(path, json=body).json() == {"status": "rejected"}
    shown = api.operator.get(f"/v1/runs/{run.run_id}/rounds/1").json()["devices"][0]
    assert "expected 2 GiB" in shown["reason"]
    assert device.poll() is None


def test_a_wait_ends_when_the_server_stops(home: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        with running_api(settings_in(home)) as stopping:
            device = stopping.enrol()
            poll = threads.submit(_poll_with_own_client, stopping.url, device.credential)
            time.sleep(0.5)
            started = time.monotonic()
        assert time.monotonic() - started < 4
        assert poll.result() is None


def _poll_with_own_client(url: str, credential: str) -> Assignment | None:
    import httpx

    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {credential}"}, trust_env=False) as http:
        return DeviceClient("", credential, http).poll(30)
