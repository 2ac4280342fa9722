"""Brings a database's schema up to date, by the migrations and by nothing else."""

import os
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, event, func, pool, select
from sqlalchemy.orm import Session

from persistence.database import connect
from persistence.errors import StorageError

_CHECK = "PRAGMA foreign_key_check"
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
        StorageError: the folder of the migrations is not there, or they would leave a row that names none.
    """
    config = alembic_config(migrations)
    engine = migration_engine(url)
    # On SQLite the transaction is the lock: it begins with BEGIN IMMEDIATE.
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        if connection.dialect.name == "sqlite" and (broken := connection.exec_driver_sql(_CHECK).all()):
            raise StorageError(f"after the migrations {len(broken)} rows name rows that are not there: {broken[:3]}")


def migration_engine(url: str) -> Engine:
    """Return an engine for migrations.

    SQLite alters a table by copying and dropping it, which its foreign keys would forbid as soon as there are rows; so
    they are off, and `upgrade` checks them at the end.
    """
    engine = connect(url, poolclass=pool.NullPool)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _without_foreign_keys)
    return engine


def _without_foreign_keys(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA foreign_keys = OFF")


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
