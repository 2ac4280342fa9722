"""Brings a database's schema up to date, by the migrations and by nothing else."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, func, pool, select
from sqlalchemy.orm import Session

from persistence.database import connect
from persistence.errors import StorageError

_SCHEMA_LOCK = 0x736368656D61  # "schema"; any number that no other lock of the database uses.


def upgrade(url: str, *, migrations: Path | None = None, revision: str = "head") -> None:
    """Apply the migrations that the database lacks, in one transaction, under a lock.

    The API and the workers call it when they start, at the same moment if it so happens: one does the work, the others
    wait and find nothing to do.

    Args:
        url: as for `Database`.
        migrations: the folder; by default `$COTUNE_MIGRATIONS`, else `migrations/` beside `services/`.
        revision: where to stop.

    Raises:
        StorageError: the folder of the migrations is not there, or a newer release has upgraded the database.
    """
    config = alembic_config(migrations)
    with migration(connect(url, poolclass=pool.NullPool)) as connection:
        _refuse_newer(connection, config)
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


@contextmanager
def migration(engine: Engine) -> Iterator[Connection]:
    """Open the one transaction in which the schema may change: under a lock, committed on exit.

    SQLite alters a table by copying it, dropping the old one and renaming the copy. The drop would be refused while
    other tables' rows refer to it, so foreign keys are not enforced meanwhile, and are checked before the commit.

    Args:
        engine: without a pool, so that no other user ever gets this connection.

    Raises:
        StorageError: on SQLite, rows would refer to rows that are not there; nothing is changed.
    """
    with engine.connect() as connection:
        sqlite = connection.dialect.name == "sqlite"
        if sqlite:
            # On the driver's connection: inside a transaction, which SQLAlchemy would begin, it has no effect.
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.execute("PRAGMA foreign_keys = OFF")
        # On SQLite the transaction is the lock: it begins with BEGIN IMMEDIATE.
        with connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
            yield connection
            if sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all()):
                tables = ", ".join(sorted({str(row[0]) for row in broken}))
                raise StorageError(f"a migration would leave rows that refer to missing ones, in: {tables}")


def _refuse_newer(connection: Connection, config: Config) -> None:
    scripts = ScriptDirectory.from_config(config)
    current = _revision(connection)
    if current is not None and current not in {each.revision for each in scripts.walk_revisions()}:
        raise StorageError(
            f"the database's schema is at revision {current}, which this release does not know (its newest is "
            f"{scripts.get_current_head()}): run the release that upgraded it, or restore the backup from before"
        )


def is_current(session: Session, *, migrations: Path | None = None) -> bool:
    """Return whether the database's schema is the newest that this code knows."""
    return _revision(session.connection()) == ScriptDirectory.from_config(alembic_config(migrations)).get_current_head()


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def alembic_config(migrations: Path | None = None) -> Config:
    """Return Alembic's configuration; give it a connection in `attributes` before a command. Raises StorageError."""
    beside_services = Path(__file__).resolve().parents[2] / "migrations"
    folder = migrations or Path(os.environ.get("COTUNE_MIGRATIONS") or beside_services)
    if not (folder / "env.py").is_file():
        raise StorageError(
            f"expected the migrations (env.py and versions/) in {folder}; COTUNE_MIGRATIONS names the folder"
        )
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return config
