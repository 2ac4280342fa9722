"""The feed: no wake-up is lost, and a database that is away does not end it."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.pool import QueuePool

from cloud_api.assignments.board import WorkBoard
from cloud_api.cloud import open_cloud
from cloud_api.feed import WORK, Feed, run_topic, topics
from persistence import events
from persistence.open_work import OpenWork
from protocol.errors import DomainError, ErrorCode
from protocol.events import Event, EventType
from tests.cloud_api.running_api import settings_in

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Table:
    """Events in a list, and a database that can be away."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.fault: Exception | None = None
        self.reads = 0
        self.board = WorkBoard(self.look, self.touch, trusted_seconds=0)

    async def look(self) -> OpenWork:
        return OpenWork(())

    async def touch(self, _device_ids: Sequence[str]) -> None:
        raise AssertionError("no device was seen")

    def append(self, kind: EventType = EventType.ROUND_OPENED, run_id: str = "run_1", **data: Any) -> None:
        sequence = len(self.events) + 1
        self.events.append(Event(sequence=sequence, type=kind, time=NOW, run_id=run_id, data=data))

    async def newest(self) -> int:
        self._read()
        return len(self.events)

    async def after(self, sequence: int) -> Sequence[Event]:
        self._read()
        return self.events[sequence : sequence + 2]

    def _read(self) -> None:
        self.reads += 1
        if self.fault is not None:
            raise self.fault


def follow(table: Table, test: Any, *, interval_seconds: float = 0.01) -> None:
    async def run() -> None:
        feed = Feed(table.newest, table.after, board=table.board, interval_seconds=interval_seconds)
        following = asyncio.create_task(feed.follow())
        try:
            async with asyncio.timeout(10):
                await test(feed)
        finally:
            feed.stop()
            await following

    asyncio.run(run())


def test_a_waiter_is_woken_by_its_topic_only() -> None:
    table = Table()

    async def test(feed: Feed) -> None:
        with feed.subscribe(run_topic("run_1")) as mine, feed.subscribe(run_topic("run_2")) as other:
            assert await mine.wait(1)  # the feed's start wakes everybody once
            assert await other.wait(1)
            table.append(run_id="run_1")
            assert await mine.wait(5)
            assert not await other.wait(0.1)

    follow(table, test)


def test_whom_news_does_not_concern_sleeps_on_until_the_process_stops() -> None:
    table = Table()

    async def test(feed: Feed) -> None:
        with feed.subscribe(run_topic("run_1")) as mine, feed.subscribe(run_topic("run_1")) as other:
            assert await mine.wait(1)  # the feed's start
            assert await other.wait(1)
            mine.is_concerned, other.is_concerned = lambda: True, lambda: False
            table.append(run_id="run_1")
            assert await mine.wait(5)
            assert not await other.wait(0.1)
            asyncio.get_running_loop().call_later(0.05, feed.stop)
            assert await other.wait(5)

    follow(table, test)


def test_events_before_the_first_look_wake_who_subscribed_before_it() -> None:
    table = Table()
    table.append()

    async def test(feed: Feed) -> None:
        with feed.subscribe(WORK) as waiter:
            assert await waiter.wait(5)

    follow(table, test)


def test_a_nudge_makes_it_look_at_once() -> None:
    table = Table()

    async def test(feed: Feed) -> None:
        with feed.subscribe(WORK) as waiter:
            assert await waiter.wait(5)
            table.append()
            feed.nudge()
            assert await waiter.wait(5)

    follow(table, test, interval_seconds=3600)


def test_more_events_than_a_page_are_all_seen() -> None:
    table = Table()

    async def test(feed: Feed) -> None:
        with feed.subscribe(run_topic("last")) as waiter:
            assert await waiter.wait(5)
            for index in range(9):
                table.append(run_id=f"run_{index}")
            table.append(run_id="last")
            assert await waiter.wait(5)

    follow(table, test)


@pytest.mark.parametrize("fault", [DomainError(ErrorCode.UNAVAILABLE, "away"), RuntimeError("a mistake of ours")])
def test_it_goes_on_after_a_fault(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    monkeypatch.setattr("cloud_api.feed.PAUSE_AFTER_FAILURE_SECONDS", 0.02)
    table = Table()

    async def test(feed: Feed) -> None:
        with feed.subscribe(WORK) as waiter:
            assert await waiter.wait(5)
            table.fault = fault
            table.append()
            assert not await waiter.wait(0.2)
            table.fault = None
            assert await waiter.wait(5)

    follow(table, test)


def test_a_stop_wakes_everybody_also_who_comes_later() -> None:
    async def test(feed: Feed) -> None:
        with feed.subscribe("a topic") as waiter:
            await waiter.wait(1)
            asyncio.get_running_loop().call_later(0.05, feed.stop)
            assert await waiter.wait(30)
            assert waiter.stopping
        with feed.subscribe("another") as late:
            assert await late.wait(30)

    follow(Table(), test, interval_seconds=3600)


@pytest.mark.parametrize(
    ("kind", "to", "wakes"),
    [
        (EventType.ROUND_OPENED, None, True),
        (EventType.RUN_STATUS_CHANGED, "running", True),
        (EventType.RUN_STATUS_CHANGED, "failed", False),
        (EventType.ASSIGNMENT_STATUS_CHANGED, "rejected", True),
        (EventType.ASSIGNMENT_STATUS_CHANGED, "training", False),
        (EventType.DEVICE_STATUS_CHANGED, "registered", True),
        (EventType.ROUND_METRICS, None, False),
    ],
)
def test_what_may_mean_work(kind: EventType, to: str | None, wakes: bool) -> None:
    event = Event(sequence=1, type=kind, time=NOW, run_id="run_1", data={"to": to})
    assert (WORK in set(topics(event))) is wakes
    assert run_topic("run_1") in set(topics(event))


def test_news_wait_for_nobody_who_waits_for_a_turn(home: Path) -> None:
    async def run() -> None:
        cloud = open_cloud(settings_in(home))
        turns = cloud.database.engine.pool
        assert isinstance(turns, QueuePool)
        async with AsyncExitStack() as taken, asyncio.timeout(30):
            for _ in range(turns.size()):
                await taken.enter_async_context(cloud.transactions.reading())
            with cloud.feed.subscribe(WORK) as waiter:
                following = asyncio.create_task(cloud.feed.follow())
                assert await waiter.wait(10)  # the feed's start
                with cloud.database.transaction() as session:
                    events.append(session, EventType.ROUND_OPENED, NOW, data={})
                assert await waiter.wait(10)
        cloud.feed.stop()
        await following
        cloud.close()

    asyncio.run(run())
