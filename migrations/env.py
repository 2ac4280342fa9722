"""Alembic's entry: with a connection from `persistence.schema`, or by hand with `COTUNE_DATABASE_URL`."""

import os
from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, Enum, pool

from persistence import operator_tables, tables  # noqa: F401 - so that the metadata has every table
from persistence.addresses import database_address
from persistence.column_types import FiniteJson, UtcDateTime
from persistence.database import connect
from persistence.schema import migration
from persistence.table_base import Table


def render_plainly(kind: str, item: Any, _context: AutogenContext) -> str | Literal[False]:
    """Write our column types as what they are in the database: an old migration must not change with our code."""
    if kind == "type":
        match item:
            case UtcDateTime():
                return "sa.DateTime(timezone=True)"
            case FiniteJson():
                return "sa.JSON()"
            case Enum():
                return f"sa.String(length={item.length})"
    return False


def run(connection: Connection) -> None:
    # Both databases can undo DDL; Alembic assumes that SQLite cannot, because of its driver's old habit of committing
    # before DDL, which `connect` has switched off. `render_as_batch`: SQLite alters a table by copying it.
    context.configure(
        connection=connection,
        target_metadata=Table.metadata,
        transactional_ddl=True,
        render_as_batch=True,
        render_item=render_plainly,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with migration(connect(database_address(os.environ, default=""), poolclass=pool.NullPool)) as own:
        run(own)
