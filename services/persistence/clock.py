"""The one clock of a cloud: the database's.

Workers, controllers and API processes compare times that others of them wrote: when a lease ends, when a round is due,
when a device was heard of. Were each to read its own machine's clock, one that is behind by more than a lease would
take leases that are over already. So all of them read the database's; only agents, elsewhere, have their own.

On SQLite it is the machine's, which all processes share since they share the file.
"""

import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

from persistence.database import Database
from protocol.errors import DomainError

FOLLOW_SECONDS = 30.0
"""A `DatabaseClock` is compared with the database's again after so long."""

_NOW = {
    "postgresql": text("SELECT clock_timestamp()"),  # now() is the transaction's start
    "sqlite": text("SELECT strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')"),
}


def utc_now() -> datetime:
    """Return the time by this machine's clock."""
    return datetime.now(UTC)


def database_now(session: Session) -> datetime:
    """Return the time by the database's clock."""
    found = session.execute(_NOW[session.get_bind().dialect.name]).scalar_one()
    return (datetime.fromisoformat(found) if isinstance(found, str) else found).astimezone(UTC)


class DatabaseClock:
    """The database's clock without a question to it each time: its time when last asked, and what has passed since.

    Until it has answered once, this machine's.
    """

    def __init__(self, database: Database) -> None:
        self._set(utc_now(), -FOLLOW_SECONDS)
        with suppress(DomainError):  # UNAVAILABLE: the next `refresh` or `follow` asks again
            self.refresh(database)

    def now(self) -> datetime:
        """Return the time."""
        at, measured, _ = self._known
        return at + timedelta(seconds=time.monotonic() - measured)

    def refresh(self, database: Database) -> None:
        """`follow` in a session of its own, if one is due.

        Raises:
            DomainError: UNAVAILABLE, the database does not answer.
        """
        if self._is_due():
            with database.reading() as session:
                self.follow(session)

    def follow(self, session: Session) -> None:
        """Compare with the database's clock, if the last comparison is `FOLLOW_SECONDS` old."""
        if self._is_due():
            self._set(database_now(session), FOLLOW_SECONDS)

    def _is_due(self) -> bool:
        return time.monotonic() >= self._known[2]

    def _set(self, at: datetime, good_seconds: float) -> None:
        measured = time.monotonic()
        self._known = (at, measured, measured + good_seconds)
