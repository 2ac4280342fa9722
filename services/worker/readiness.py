"""Whether a worker with these settings could work now: for health checks and for operators. Loads no torch."""

from persistence import schema
from persistence.blobs import open_store
from persistence.database import Database
from persistence.errors import StorageError
from protocol.errors import DomainError
from worker.celery_app import make_app
from worker.settings import Settings

ANSWER_SECONDS = 5.0


def problems(settings: Settings) -> list[str]:
    """Return in words what is missing, nothing if a worker could work: database, blobs, queue, each looked at."""
    found = {"database": _database(settings), "blobs": _blobs(settings), "queue": _queue(settings)}
    return [f"{name}: {problem}" for name, problem in found.items() if problem is not None]


def _database(settings: Settings) -> str | None:
    try:
        database = Database(settings.database_url)
        with database.reading() as session:
            current = schema.is_current(session)
        database.dispose()
    except DomainError as error:
        return error.detail
    except StorageError as error:
        return str(error)
    return None if current else "its schema is not that of this release"


def _blobs(settings: Settings) -> str | None:
    try:
        open_store(settings.blobs, settings.home / "scratch").check()
    except DomainError as error:
        return error.detail
    except StorageError as error:
        return str(error)
    return None


def _queue(settings: Settings) -> str | None:
    try:
        with make_app(settings).connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=ANSWER_SECONDS)
    except Exception as error:  # whatever the broker's library raises
        return f"{type(error).__name__}: {error}"[:200]
    return None
