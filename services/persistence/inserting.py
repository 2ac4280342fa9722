"""Inserting a row that may be there already, the same on SQLite and PostgreSQL."""

import functools
from collections.abc import Mapping
from typing import Any, cast

from sqlalchemy import Executable, FromClause, inspect
from sqlalchemy.dialects.postgresql import Insert as PostgresqlInsert
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import Insert as SqliteInsert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from persistence.table_base import Table


def insert_into(dialect: str, table: FromClause) -> PostgresqlInsert | SqliteInsert:
    """Return a database's INSERT, which has `on_conflict_do_nothing` and `on_conflict_do_update`."""
    return (postgresql_insert if dialect == "postgresql" else sqlite_insert)(cast("Any", table))


def dialect_of(session: Session) -> str:
    """Return which database the session speaks to."""
    return session.get_bind().dialect.name


def insert_or_keep(session: Session, table: type[Table], values: Mapping[str, object]) -> bool:
    """Insert a row, or keep the one that is there; return whether it was inserted.

    Two transactions may do it at once: the second waits until the first has ended.
    """
    return session.execute(_keeping(dialect_of(session), table), dict(values)).first() is not None


@functools.cache
def _keeping(dialect: str, table: type[Table]) -> Executable:
    # RETURNING, as the count of rows of an INSERT is not known with every driver.
    statement = insert_into(dialect, table.__table__).on_conflict_do_nothing()
    return statement.returning(*inspect(table).primary_key)
