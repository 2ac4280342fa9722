"""Polls that find nothing cost the database nothing, and nothing is lost by it."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, update

from cloud_api.assignments import board
from persistence import devices
from persistence.enrolment import DeviceIdentity
from persistence.open_work import OpenRound, OpenWork
from persistence.tables import DeviceRow
from protocol.errors import DomainError, ErrorCode
from tests.cloud_api.running_api import DeviceClient, RunningApi, running_api, settings_in

TRUSTED_SECONDS = 1.0

SETTLED_SECONDS = 0.3
"""Six looks of the feed."""


@pytest.fixture
def often_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for before an API that starts with it."""
    monkeypatch.setattr(board, "RENEWED_SECONDS", 0.05)


@pytest.fixture
def remembering_api(home: Path) -> Iterator[RunningApi]:
    with running_api(settings_in(home, trusted_seconds=TRUSTED_SECONDS)) as running:
        yield running


@contextmanager
def statements_of_devices(api: RunningApi) -> Iterator[list[str]]:
    """Collect the statements that name a device's row: the feed's own do not."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "devices" in statement and "SET last_seen_at" not in statement:
            seen.append(statement)

    event.listen(api.cloud.database.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(api.cloud.database.engine, "before_cursor_execute", note)


def settled(api: RunningApi) -> None:
    time.sleep(SETTLED_SECONDS)


def status_of(device: DeviceClient) -> int:
    return device.http.get("/v1/devices/me/assignment").status_code


def test_the_first_poll_asks_the_database_and_the_next_do_not(remembering_api: RunningApi) -> None:
    device = remembering_api.enrol()
    settled(remembering_api)
    with statements_of_devices(remembering_api) as seen:
        assert device.poll() is None
        assert seen
        seen.clear()
        for _ in range(5):
            assert device.poll() is None
        assert seen == []


def test_work_that_comes_is_found_and_what_is_begun_is_found_again(remembering_api: RunningApi) -> None:
    device, other = remembering_api.enrol("one"), remembering_api.enrol("other")
    assert device.poll() is None
    assert other.poll() is None
    remembering_api.running_run(device)
    assignment = device.poll(wait_seconds=5)
    assert assignment is not None
    settled(remembering_api)
    again = device.poll()
    assert again is not None
    assert again.assignment_id == assignment.assignment_id
    assert other.poll() is None


def test_a_place_that_becomes_free_is_found(remembering_api: RunningApi) -> None:
    first, second = remembering_api.enrol("first"), remembering_api.enrol("second")
    remembering_api.running_run(first, second, max_updates=1)
    taken = first.poll(wait_seconds=5)
    assert taken is not None
    settled(remembering_api)
    assert second.poll() is None
    refusal = {"code": "busy", "reason": "no time"}
    path = f"/v1/assignments/{taken.assignment_id}/refusal"
    assert first.http.post(path, json=refusal).status_code == 200
    assert second.poll(wait_seconds=5) is not None


def test_a_revoked_device_is_told_so(remembering_api: RunningApi) -> None:
    device = remembering_api.enrol()
    assert device.poll() is None
    assert remembering_api.operator.post(f"/v1/devices/{device.device_id}/revoke").status_code == 200
    settled(remembering_api)
    assert status_of(device) == 403


def test_a_wrong_credential_is_never_taken_for_a_known_one(remembering_api: RunningApi) -> None:
    device = remembering_api.enrol()
    assert device.poll() is None
    assert remembering_api.client(f"{device.device_id}.wrong").get("/v1/devices/me/assignment").status_code == 401
    assert remembering_api.client(None).get("/v1/devices/me/assignment").status_code == 401


def test_a_replaced_credential_is_void_soon_after_the_next_one_was_used(remembering_api: RunningApi) -> None:
    device = remembering_api.enrol()
    assert device.poll() is None
    replaced = device.http.post("/v1/devices/me/credential").json()["credential"]
    assert remembering_api.client(replaced).get("/v1/devices/me/assignment").status_code == 204
    time.sleep(TRUSTED_SECONDS)
    assert status_of(device) == 401


def test_devices_that_only_poll_are_seen(often_renewed: None, remembering_api: RunningApi) -> None:
    device = remembering_api.enrol()
    assert device.poll() is None
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    with remembering_api.cloud.database.transaction() as session:
        session.execute(update(DeviceRow).values(last_seen_at=long_ago))
    assert device.poll() is None
    settled(remembering_api)
    with remembering_api.cloud.database.reading() as session:
        assert devices.get_device(session, device.device_id).last_seen_at > long_ago + timedelta(minutes=59)


def test_a_database_that_is_away_is_not_hidden(remembering_api: RunningApi) -> None:
    device = remembering_api.enrol()
    assert device.poll() is None
    home = remembering_api.cloud.settings.home
    (home / "cotune.sqlite3").rename(home / "moved")
    (home / "cotune.sqlite3").mkdir()
    remembering_api.cloud.database.engine.dispose()
    settled(remembering_api)
    assert status_of(device) == 503
    (home / "cotune.sqlite3").rmdir()
    (home / "moved").rename(home / "cotune.sqlite3")


def test_who_was_seen_is_written_down_once_the_database_is_back(often_renewed: None) -> None:
    asked: list[Sequence[str]] = []

    async def touch(device_ids: Sequence[str]) -> None:
        asked.append(device_ids)
        seen.saw(f"dev_{len(asked)}")
        if len(asked) == 1:
            raise DomainError(ErrorCode.UNAVAILABLE, "the database is away")

    seen = board.WorkBoard(nothing, touch, trusted_seconds=60)

    async def run() -> None:
        seen.saw("dev_0")
        async with asyncio.timeout(10):
            writing = asyncio.create_task(seen.write_down())
            while len(asked) < 3:
                await asyncio.sleep(0.01)
            writing.cancel()

    asyncio.run(run())
    assert asked[:3] == [["dev_0"], ["dev_0", "dev_1"], ["dev_2"]]


async def nothing() -> OpenWork:
    return OpenWork([])


def round_of(**changed: Any) -> OpenRound:
    values = {"device_ids": None, "has_place": True, "assigned": frozenset(), "delivering": frozenset()}
    return OpenRound(**(values | changed))


@pytest.mark.parametrize(
    ("open_round", "concerned"),
    [
        (round_of(), True),
        (round_of(has_place=False), False),
        (round_of(device_ids=frozenset({"me"})), True),
        (round_of(device_ids=frozenset({"other"})), False),
        (round_of(assigned=frozenset({"me"})), False),
        (round_of(assigned=frozenset({"me"}), delivering=frozenset({"me"}), has_place=False), True),
    ],
)
def test_whom_a_round_concerns(open_round: OpenRound, concerned: bool) -> None:
    assert OpenWork([open_round]).may_concern("me") is concerned
    assert not OpenWork([]).may_concern("me")


def test_no_more_devices_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "MOST_DEVICES", 3)

    async def touch(_device_ids: Any) -> None:
        return None

    remembering = board.WorkBoard(nothing, touch, trusted_seconds=60)
    for number in range(5):
        remembering.remember(f"dev_{number}.secret", DeviceIdentity(f"dev_{number}", None, None))
    known = [remembering.recall(f"dev_{number}.secret") is not None for number in range(5)]
    assert known == [False, False, True, True, True]
    assert not remembering.has_nothing_for("dev_4")  # nothing was looked at yet
