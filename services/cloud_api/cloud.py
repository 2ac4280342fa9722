"""What the endpoints work with: one `Cloud` a process, made at the start and passed down."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from cloud_api.assignments.board import WorkBoard
from cloud_api.brief_memory import BriefMemory, InProcessMemory, RedisMemory
from cloud_api.dispatch import Dispatcher
from cloud_api.feed import Feed
from cloud_api.one_at_a_time import OneAtATime
from cloud_api.rate_limits import RateLimits
from cloud_api.recent import Recent
from cloud_api.request_metrics import RequestMetrics
from cloud_api.settings import Settings
from cloud_api.threads import entered_in_thread, in_thread
from cloud_api.transfers import Transfers
from persistence import devices, events, open_work
from persistence.blobs import BlobStore, open_store
from persistence.clock import DatabaseClock
from persistence.counts import Counts
from persistence.database import Database
from protocol.events import Event
from protocol.queue import queue_folder

Result = TypeVar("Result")

FEED_PAGE = 500
"""Events that the feed reads at once."""


class Transactions:
    """Database work in threads, never more at a time than the pool has connections.

    Without that bound, requests that hold a connection would wait for a thread while every thread waits for a
    connection. Waiting for a turn here costs neither.

    SQLite has one writer at a time. Whom it makes wait sleeps in its thread for up to 0.1 s at a time, and in no order;
    here writers follow one another at once, in theirs.

    Args:
        database: where.
        told: called in the event loop after a commit that added events.
    """

    def __init__(self, database: Database, told: Callable[[], None] = lambda: None) -> None:
        pool = database.engine.pool
        self._database = database
        self._told = told
        self._turns = asyncio.Semaphore(pool.size() if isinstance(pool, QueuePool) else 1)
        one_writer = database.engine.dialect.name == "sqlite"
        self._to_write: AbstractAsyncContextManager[object] = asyncio.Lock() if one_writer else nullcontext()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Session]:
        """Open a transaction that may write; it is committed on exit."""
        async with (
            self._to_write,
            self._turns,
            entered_in_thread(self._database.transaction()) as session,
        ):
            yield session
        if events.were_written(session):
            self._told()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Session]:
        """Open a session that only reads."""
        async with self._turns, entered_in_thread(self._database.reading()) as session:
            yield session

    async def write(self, work: Callable[[Session], Result], *, durable: bool = True) -> Result:
        """Run `work` in a transaction of its own and return what it returned, once that is committed.

        Args:
            work: what to do.
            durable: see `Database.transaction`.
        """

        def call() -> tuple[Result, bool]:
            with self._database.transaction(durable=durable) as session:
                result = work(session)
            return result, events.were_written(session)

        async with self._to_write, self._turns:
            result, told = await in_thread(call)
        if told:
            self._told()
        return result

    async def read(self, work: Callable[[Session], Result]) -> Result:
        """Run `work` in a session that only reads."""
        async with self._turns:
            return await self.read_at_once(work)

    async def read_at_once(self, work: Callable[[Session], Result]) -> Result:
        """Do as `read` does, out of turn: for what has to be seen when thousands of requests wait for theirs.

        Few may ask for it at a time. It holds a connection that a request in turn may have to wait for in its thread.
        """

        def call() -> Result:
            with self._database.reading() as session:
                return work(session)

        return await in_thread(call)


@dataclass(frozen=True)
class Cloud:
    """The settings and the connections of this process."""

    settings: Settings
    database: Database
    transactions: Transactions
    blobs: BlobStore
    dispatcher: Dispatcher
    feed: Feed
    board: WorkBoard
    now: Callable[[], datetime]
    """The time that everything this process does is stamped with: the database's."""
    memory: BriefMemory
    limits: RateLimits
    counts: Recent[Counts | None]
    checks: Recent[dict[str, str]]
    completing: OneAtATime = field(default_factory=OneAtATime)
    """Uploads that are put together now."""
    transfers: Transfers = field(default_factory=Transfers)
    """Files that come and go now."""
    request_metrics: RequestMetrics = field(default_factory=RequestMetrics)

    async def write(self, work: Callable[[Session], Result], *, durable: bool = True) -> Result:
        """Run `work` in a transaction; wake who waits for what it committed."""
        return await self.transactions.write(work, durable=durable)

    async def read(self, work: Callable[[Session], Result]) -> Result:
        """Run `work` in a session that only reads."""
        return await self.transactions.read(work)

    def close(self) -> None:
        """Let go of everything; the process ends."""
        self.dispatcher.close()
        self.memory.close()
        self.database.dispose()


def open_cloud(settings: Settings) -> Cloud:
    """Connect to everything that the settings name. The database's schema must be there.

    Raises:
        StorageError: the database's address or the blob store cannot be used.
    """
    blobs = open_store(settings.blobs, settings.home / "scratch")
    dispatcher = Dispatcher(settings.broker_url, settings.queue_prefix)
    database = Database(settings.database_url, dispatch=dispatcher.send, stored=blobs.exists)
    transactions = Transactions(database, told=lambda: feed.nudge())  # noqa: PLW0108 - the feed is made of these
    clock = DatabaseClock(database)

    def look(session: Session) -> int:
        clock.follow(session)
        return events.last_sequence(session)

    # Out of turn, or news would reach those who wait only after thousands who ask for the first time.
    async def newest() -> int:
        return await transactions.read_at_once(look)

    async def after(sequence: int) -> list[Event]:
        return await transactions.read_at_once(
            lambda session: events.list_events(session, run_id=None, after=sequence, limit=FEED_PAGE)
        )

    async def touch(device_ids: Sequence[str]) -> None:
        await transactions.write(lambda session: devices.touch_many(session, device_ids, clock.now()))

    board = WorkBoard(
        lambda: transactions.read_at_once(open_work.look), touch, trusted_seconds=settings.trusted_seconds
    )
    feed = Feed(newest, after, board=board, interval_seconds=settings.feed_seconds)
    memory = _brief_memory(settings)
    limits = RateLimits(memory, settings.rates)
    counts: Recent[Counts | None] = Recent(settings.probe_seconds)
    checks: Recent[dict[str, str]] = Recent(settings.probe_seconds)
    return Cloud(
        settings, database, transactions, blobs, dispatcher, feed, board, clock.now, memory, limits, counts, checks
    )


def _brief_memory(settings: Settings) -> BriefMemory:
    if queue_folder(settings.broker_url) is None:
        return RedisMemory(settings.broker_url, settings.queue_prefix)
    return InProcessMemory()
