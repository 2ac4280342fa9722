"""The connection to the database, and the one place that commits.

SQLite: write-ahead log, foreign keys, full synchronisation (a device deletes its copy after our answer, so a commit
must survive a power cut), and `BEGIN IMMEDIATE` for writers, since a transaction that reads first and writes later
could otherwise fail in the middle. PostgreSQL: psycopg 3, read committed; decisions take row locks.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, exc, make_url, text
from sqlalchemy.orm import Session, sessionmaker

from persistence import events
from persistence.errors import CommittedRefusal, StorageError
from protocol.errors import DomainError, ErrorCode
from protocol.statuses import JobKind

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_SECONDS = 20
"""How long a SQLite writer waits for another one."""

_BEGIN = "cotune_begin"
_SYNCHRONOUS = "cotune_synchronous"
_JOBS = "cotune_queued_jobs"
_BLOBS = "cotune_required_blobs"


_LOOSELY = text("SET LOCAL synchronous_commit = off")


@dataclass(frozen=True)
class JobMessage:
    """What is sent to the queue: a hint that a job may be claimed."""

    job_id: str
    kind: JobKind


def queue_message(session: Session, message: JobMessage) -> None:
    """Remember a message that `Database.transaction` sends once the session's transaction is committed."""
    session.info.setdefault(_JOBS, []).append(message)


def require_blob(session: Session, sha256: str) -> None:
    """Have `Database.transaction` see, before it commits, that the blob store has the file."""
    session.info.setdefault(_BLOBS, set()).add(sha256)


def connect(url: str, **options: Any) -> Engine:
    """Return an engine for `sqlite:///<file>` or `postgresql://...`, set up as the module's docstring says.

    Raises:
        StorageError: another database, or not an address.
    """
    try:
        address = make_url(url)
    except exc.ArgumentError:
        raise StorageError("the database's address is not one: expected sqlite:///<file> or postgresql://...") from None
    backend = address.get_backend_name()
    if backend == "postgresql":
        return create_engine(address.set(drivername="postgresql+psycopg"), pool_pre_ping=True, **options)
    if backend != "sqlite" or not address.database or address.database == ":memory:":
        raise StorageError(f"expected sqlite:///<file> or postgresql://..., got {address.render_as_string()}")
    engine = create_engine(address, connect_args={"timeout": BUSY_TIMEOUT_SECONDS}, **options)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # The driver begins nothing by itself; `_begin_sqlite` does.
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_SECONDS * 1000}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    wanted = options.get(_SYNCHRONOUS, "FULL")
    if connection.info.get(_SYNCHRONOUS, "FULL") != wanted:  # not possible once it has begun
        connection.exec_driver_sql(f"PRAGMA synchronous = {wanted}")
        connection.info[_SYNCHRONOUS] = wanted
    connection.exec_driver_sql(f"BEGIN {options.get(_BEGIN, 'IMMEDIATE')}")


class Database:
    """Transactions on one database.

    Args:
        url: `sqlite:///<file>` or `postgresql://user@host/name`.
        dispatch: sends a job's message to the queue; called after the commit that queued it. What it raises is logged
            and no more: the sweep sends again what the queue did not get.
        stored: whether the blob store has a file of this SHA-256; None looks at none.
    """

    def __init__(
        self,
        url: str,
        dispatch: Callable[[JobMessage], None] | None = None,
        stored: Callable[[str], bool] | None = None,
    ) -> None:
        self.engine = connect(url)
        self._dispatch = dispatch
        self._stored = stored
        self._writing = sessionmaker(self.engine, expire_on_commit=False)
        self._writing_loosely = sessionmaker(
            self.engine.execution_options(**{_SYNCHRONOUS: "NORMAL"}), expire_on_commit=False
        )
        self._reading = sessionmaker(self.engine.execution_options(**{_BEGIN: "DEFERRED"}), expire_on_commit=False)

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[Session]:
        """Open a session that may write; commit on exit, roll back on an error, then send the jobs it queued.

        A `CommittedRefusal` commits and is raised again.

        Args:
            durable: whether what is committed must be on the disk before anybody is told. If not, a power cut (and
                nothing less: no kill) may undo it, with all that was committed so after it; a disk is not waited for.
                For what is said again when it is not there.

        Raises:
            DomainError: UNAVAILABLE, the database does not answer or is busy for too long (safe to repeat);
                INVALID_FIELD, it cannot hold a value (for example a NUL character in a text);
                UNAVAILABLE too where a registered file is not in the blob store any more: store it and try again.
        """
        session = (self._writing if durable else self._writing_loosely)()
        refusal: CommittedRefusal | None = None
        with _translate_errors(), session:
            if not durable and self.engine.dialect.name == "postgresql":
                session.execute(_LOOSELY)
            try:
                yield session
            except CommittedRefusal as error:
                refusal = error
            session.flush()
            self._check_blobs(session)
            events.write_pending(session)
            session.commit()
        self._send(session.info.pop(_JOBS, []))
        if refusal is not None:
            raise refusal

    @contextmanager
    def holding(self) -> Iterator[Session]:
        """Open a session that writes and keeps nothing: its locks hold until the end, then all is rolled back."""
        with _translate_errors(), self._writing() as session:
            yield session
            session.rollback()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a session that only reads: on SQLite it waits for no writer. Nothing is committed."""
        with _translate_errors(), self._reading() as session:
            yield session

    def ping(self) -> None:
        """Ask the database for nothing. Raises DomainError UNAVAILABLE if it does not answer."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))

    def dispose(self) -> None:
        """Close the pool's connections."""
        self.engine.dispose()

    def _check_blobs(self, session: Session) -> None:
        # After the rows are inserted, so that the sweep of orphans has either removed the file or cannot any more.
        for sha256 in session.info.pop(_BLOBS, set()):
            if self._stored is not None and not self._stored(sha256):
                raise DomainError(
                    ErrorCode.UNAVAILABLE, f"file {sha256} was removed from the store just now; store it again"
                )

    def _send(self, messages: Sequence[JobMessage]) -> None:
        if self._dispatch is None:
            return
        for number, message in enumerate(messages):
            try:
                self._dispatch(message)
            except Exception as error:  # The queue is a hint; whatever its library raises, the commit stands.
                left = len(messages) - number
                logger.warning(
                    "job_not_sent job_id=%s kind=%s left=%d error=%s", message.job_id, message.kind, left, error
                )
                return  # To find out the same for each of the others could take seconds each.


@contextmanager
def _translate_errors() -> Iterator[None]:
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
        cause = str(getattr(error, "orig", error)).strip().splitlines()
        detail = f"the database does not answer: {cause[0] if cause else type(error).__name__}"
        raise DomainError(ErrorCode.UNAVAILABLE, detail) from error
    except exc.DataError as error:
        raise DomainError(ErrorCode.INVALID_FIELD, f"a value cannot be stored: {error.orig}") from error
