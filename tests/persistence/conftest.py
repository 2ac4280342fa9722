"""Each test gets an empty database with the migrations applied: SQLite always, PostgreSQL where one answers."""

import os
import secrets
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine, exc, make_url, text

from persistence import operator_tables, schema, tables  # noqa: F401 - so that the metadata has every table
from persistence.database import Database
from persistence.table_base import Table
from persistence.tables import FederationRow
from protocol.federations import DEFAULT_FEDERATION
from tests.persistence.world import World

SERVER = os.environ.get("COTUNE_TEST_POSTGRES", "postgresql+psycopg://root@127.0.0.1/test")


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The address of a database of our own on the server, dropped at the end."""
    server = create_engine(SERVER, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    name = f"cotune_test_persistence_{secrets.token_hex(6)}"
    try:
        _run(server, f"CREATE DATABASE {name}")
        _run(server, f"ALTER DATABASE {name} SET synchronous_commit = off")  # It is thrown away; be quick.
    except exc.OperationalError:
        server.dispose()
        pytest.skip(f"no PostgreSQL answers at {make_url(SERVER).render_as_string()}")
    try:
        yield make_url(SERVER).set(database=name).render_as_string(hide_password=False)
    finally:
        _run(server, f"DROP DATABASE {name} WITH (FORCE)")
        server.dispose()


class Backend:
    """A migrated database and its engine, kept for the whole session: compiling statements costs more than running."""

    def __init__(self, url: str) -> None:
        schema.upgrade(url)
        self.url = url
        self.sent: list[str] = []
        self.database = Database(url, dispatch=lambda message: self.sent.append(message.job_id))

    def empty(self) -> None:
        self.sent.clear()
        with self.database.engine.begin() as connection:
            for table in reversed(Table.metadata.sorted_tables):
                kept = FederationRow.name != DEFAULT_FEDERATION  # as the migrations leave it
                connection.execute(table.delete().where(kept) if table.name == "federations" else table.delete())


@pytest.fixture(scope="session")
def sqlite_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    backend = Backend(f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/cotune.sqlite3")
    yield backend
    backend.database.dispose()


@pytest.fixture(scope="session")
def postgresql_backend(postgresql_url: str) -> Iterator[Backend]:
    backend = Backend(postgresql_url)
    yield backend
    backend.database.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.getfixturevalue(f"{request.param}_backend")
    found.empty()
    return found


@pytest.fixture
def url(backend: Backend) -> str:
    """The address of an empty, migrated database."""
    return backend.url


@pytest.fixture
def world(backend: Backend) -> World:
    """A database with a clock, and the moves of a run in one line each."""
    return World(backend.database, backend.sent)


def _run(server: Engine, statement: str) -> None:
    with server.connect() as connection:
        connection.execute(text(statement))
