"""The same API on PostgreSQL, where one answers: a round's collecting half, with devices at the same time."""

import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, exc, make_url, text

from persistence import schema
from tests.cloud_api import test_idempotency
from tests.cloud_api.running_api import DeviceClient, RunningApi, delta_for, logits, running_api, settings_in

SERVER = os.environ.get("COTUNE_TEST_POSTGRES", "postgresql+psycopg://root@127.0.0.1/test")

pytestmark = pytest.mark.services


@pytest.fixture
def postgresql_api(tmp_path: Path) -> Iterator[RunningApi]:
    server = create_engine(SERVER, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    name = f"cotune_test_cloud_api_{secrets.token_hex(6)}"
    try:
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except exc.OperationalError:
        server.dispose()
        pytest.skip(f"no PostgreSQL answers at {make_url(SERVER).render_as_string()}")
    url = make_url(SERVER).set(database=name).render_as_string(hide_password=False)
    try:
        schema.upgrade(url)
        with running_api(settings_in(tmp_path, database_url=url, upload_chunk_bytes=100)) as running:
            yield running
    finally:
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


def deliver(device: DeviceClient, number: int) -> set[int]:
    """Wait for the round, hand an update in, one part in chunks and one at once, and hand it in again."""
    assignment = device.poll(wait_seconds=20)
    assert assignment is not None
    parts = {"adapter_delta": delta_for(assignment, fill=number), "logits": logits(number)}
    assert device.upload_in_chunks(assignment, "adapter_delta", parts["adapter_delta"]).status_code == 200
    assert device.upload(assignment, "logits", parts["logits"]).status_code == 201
    return {device.submit(assignment, parts).status_code for _ in range(2)}


def test_devices_deliver_at_the_same_time(postgresql_api: RunningApi) -> None:
    api = postgresql_api
    devices = [api.enrol(f"device-{number}") for number in range(6)]
    run = api.create_run(min_updates=6, grace_seconds=60)
    with ThreadPoolExecutor(6) as threads:
        deliveries = [threads.submit(deliver, device, number) for number, device in enumerate(devices)]
        api.prepare(run)
        assert [delivery.result() for delivery in deliveries] == [{200, 201}] * 6
    shown = api.operator.get(f"/v1/runs/{run.run_id}/rounds/1").json()
    assert {each["status"] for each in shown["devices"]} == {"submitted"}
    assert shown["status"] == "aggregating"
    events = api.operator.get(f"/v1/runs/{run.run_id}/events", params={"limit": 1000}).json()["items"]
    assert [each["type"] for each in events].count("update.submitted") == 6


def test_posts_with_one_key_at_the_same_time_do_it_once(postgresql_api: RunningApi) -> None:
    test_idempotency.test_requests_at_the_same_time_do_it_once(postgresql_api)


def test_a_device_that_waits_at_one_process_wakes_for_a_commit_in_another(postgresql_api: RunningApi) -> None:
    device = postgresql_api.enrol()
    with running_api(postgresql_api.cloud.settings) as other, ThreadPoolExecutor(1) as threads:
        poll = threads.submit(device.poll, 25)
        time.sleep(0.5)
        assert not poll.done()
        begun = time.monotonic()
        run = other.running_run(device)
        assignment = poll.result(10)
        assert time.monotonic() - begun < 5
    assert assignment is not None
    assert assignment.run_id == run.run_id
