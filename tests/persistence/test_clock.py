"""The database's clock, on both databases, and a clock of one's own that follows it."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from persistence import clock
from persistence.clock import DatabaseClock, database_now, utc_now
from persistence.database import Database
from tests.persistence.world import World

NEAR = timedelta(seconds=5)
"""The databases of the tests run on this machine; a busy one may pause in between."""


def test_it_is_the_time_and_goes_on_within_a_transaction(world: World) -> None:
    with world.database.reading() as session:
        first = database_now(session)
        assert first.tzinfo is UTC
        assert abs(first - utc_now()) < NEAR
        time.sleep(0.05)
        assert database_now(session) - first >= timedelta(seconds=0.04)


def test_a_process_follows_it_whatever_its_own_clock_shows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Behind(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) - timedelta(hours=1)

    monkeypatch.setattr(clock, "datetime", Behind)
    assert abs(utc_now() - datetime.now(UTC)) > timedelta(minutes=59)
    own = DatabaseClock(world.database)
    before = own.now()
    assert abs(before - datetime.now(UTC)) < NEAR
    time.sleep(0.05)
    assert own.now() - before >= timedelta(seconds=0.04)


def test_without_a_database_it_is_the_machines_until_one_answers(world: World, tmp_path: object) -> None:
    away = Database(f"sqlite:///{tmp_path}/no/such/folder/cotune.sqlite3")
    own = DatabaseClock(away)
    away.dispose()
    assert abs(own.now() - utc_now()) < NEAR
    own._set(utc_now() - timedelta(hours=1), 0.0)
    with world.database.reading() as session:
        own.follow(session)
    assert abs(own.now() - datetime.now(UTC)) < NEAR
    own._set(utc_now() - timedelta(hours=1), 60.0)  # compared lately
    own.refresh(world.database)
    assert own.now() < datetime.now(UTC) - timedelta(minutes=59)
