import asyncio
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from cloud_api.cloud import Transactions
from persistence import events
from persistence.database import Database
from protocol.events import EventType

PATIENCE_SECONDS = 30


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'cotune.sqlite3'}")
    yield database
    database.dispose()


def test_writers_of_sqlite_follow_one_another_in_the_order_in_which_they_came(database: Database) -> None:
    begun: list[int] = []
    inside: set[int] = set()

    def write(number: int) -> Callable[[Session], None]:
        def work(session: Session) -> None:
            assert not inside
            inside.add(number)
            session.execute(text("SELECT 1"))
            begun.append(number)
            inside.remove(number)

        return work

    async def all_at_once() -> None:
        transactions = Transactions(database)
        await asyncio.gather(*(transactions.write(write(number)) for number in range(30)))

    asyncio.run(all_at_once())
    assert begun == list(range(30))


def test_a_reader_waits_for_no_writer(database: Database) -> None:
    read = threading.Event()

    def write(session: Session) -> bool:
        session.execute(text("CREATE TABLE things (number INTEGER)"))
        return read.wait(PATIENCE_SECONDS)

    def look(session: Session) -> int:
        tables = session.execute(text("SELECT count(*) FROM sqlite_master")).scalar_one()
        read.set()
        return int(tables)

    async def both() -> tuple[bool, int]:
        transactions = Transactions(database)
        return await asyncio.gather(transactions.write(write), transactions.read(look))

    assert asyncio.run(both()) == [True, 0]


def test_a_writer_that_fails_lets_the_next_one_in(database: Database) -> None:
    def fail(session: Session) -> None:
        session.execute(text("SELECT 1"))
        raise LookupError("nothing there")

    async def one_after_another() -> int:
        transactions = Transactions(database)
        with pytest.raises(LookupError, match="nothing there"):
            await transactions.write(fail)
        async with transactions.writing() as session:
            return int(session.execute(text("SELECT 7")).scalar_one())

    assert asyncio.run(one_after_another()) == 7


def test_the_feed_is_told_of_commits_that_added_events_and_of_no_others(home: Path) -> None:
    database = Database(f"sqlite:///{home / 'cotune.sqlite3'}")
    told: list[str] = []

    def note(session: Session) -> None:
        events.append(session, EventType.RUN_CREATED, datetime.now(UTC), data={})

    def note_and_fail(session: Session) -> None:
        note(session)
        raise LookupError("nothing there")

    async def play() -> list[int]:
        transactions = Transactions(database, told=lambda: told.append("told"))
        counts = []
        await transactions.write(lambda session: session.execute(text("SELECT 1")).close())
        counts.append(len(told))
        await transactions.write(note)
        counts.append(len(told))
        with pytest.raises(LookupError):
            await transactions.write(note_and_fail)
        counts.append(len(told))
        async with transactions.writing() as session:
            note(session)
        counts.append(len(told))
        async with transactions.writing() as session:
            session.execute(text("SELECT 1"))
        counts.append(len(told))
        return counts

    assert asyncio.run(play()) == [0, 1, 1, 2, 2]
    database.dispose()
