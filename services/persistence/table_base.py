"""What every table has in common."""

from sqlalchemy import MetaData, String
from sqlalchemy.orm import DeclarativeBase

ID = String(64)
SHA256 = String(64)
REASON = String(2000)
"""Longest reason that is kept, characters; `shorten` cuts to it."""


def shorten(reason: str | None) -> str | None:
    """Cut a reason to what the column holds: PostgreSQL refuses longer text, SQLite does not."""
    return reason if reason is None or len(reason) <= 2000 else reason[:1999] + "…"


class Table(DeclarativeBase):
    """Base of every table; constraint names follow from it, so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
