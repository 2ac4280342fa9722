"""A database of an older release, full of data, is brought up to date and loses nothing."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Connection, DateTime, MetaData, String, Table, pool, select, text
from sqlalchemy.types import JSON, Boolean, Float, Integer

from persistence import schema
from persistence.database import connect
from persistence.errors import StorageError

FIRST = "0001"
ROWS = 3


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def old_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of the first revision, with rows in every table. On PostgreSQL a schema of its own."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/old.sqlite3"
        schema.upgrade(url, revision=FIRST)
        yield url
        return
    address: str = request.getfixturevalue("postgresql_url")
    engine = connect(address)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA old"))
    url = f"{address}?options=-csearch_path%3Dold"
    schema.upgrade(url, revision=FIRST)
    yield url
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA old CASCADE"))
    engine.dispose()


def a_value(column: Column[Any], row: int) -> Any:
    """A value that fits a column of the first revision; row n of a table refers to row n of the others."""
    match column.type:
        case DateTime():
            return datetime(2026, 1, 1, row, tzinfo=UTC)
        case JSON():
            return {"row": row}
        case Boolean():
            return False
        case Float():
            return 0.5
        case Integer():
            return row
        case String():
            return f"{row:04d}"
    raise AssertionError(f"a column of a type that the test does not know: {column!r}")


def contents(connection: Connection, columns: dict[str, list[str]]) -> dict[str, list[Any]]:
    """The rows of each table, in its named columns only."""
    found = MetaData()
    found.reflect(connection)
    return {
        name: sorted(repr(row) for row in connection.execute(select(*(found.tables[name].c[each] for each in named))))
        for name, named in columns.items()
    }


def fill(connection: Connection) -> dict[str, list[str]]:
    """Insert `ROWS` rows into every table; return the columns of each."""
    found = MetaData()
    found.reflect(connection)
    tables: list[Table] = [each for each in found.sorted_tables if each.name != "alembic_version"]
    for table in tables:
        for row in range(1, ROWS + 1):
            connection.execute(table.insert().values({column.name: a_value(column, row) for column in table.columns}))
    return {table.name: [column.name for column in table.columns] for table in tables}


def test_every_row_of_the_first_revision_is_there_after_the_upgrade(old_url: str) -> None:
    engine = connect(old_url)
    with engine.begin() as connection:
        columns = fill(connection)
    with engine.connect() as connection:
        before = contents(connection, columns)
    assert len(before) >= 10
    assert all(len(rows) == ROWS for rows in before.values())
    schema.upgrade(old_url)
    with engine.connect() as connection:
        assert contents(connection, columns) == before
        if engine.dialect.name == "sqlite":
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
            assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
    engine.dispose()


def test_every_row_is_there_after_each_step_down_and_the_way_up_again(old_url: str) -> None:
    engine = connect(old_url, poolclass=pool.NullPool)
    with engine.begin() as connection:
        columns = fill(connection)
    with engine.connect() as connection:
        before = contents(connection, columns)
    config = schema.alembic_config()
    revisions = [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()]
    assert revisions[-1] == FIRST
    schema.upgrade(old_url)
    for revision in revisions[1:]:
        with schema.migration(engine) as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, revision)
        with engine.connect() as connection:
            assert contents(connection, columns) == before, revision
    schema.upgrade(old_url)
    with engine.connect() as connection:
        assert contents(connection, columns) == before


def test_a_database_of_a_newer_release_is_refused_in_words(old_url: str) -> None:
    engine = connect(old_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match=r"schema is at revision 9999, which this release does not know"):
        schema.upgrade(old_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "9999"
    engine.dispose()
