"""One page of a list: as many rows as asked for, and whether there are more."""

from typing import TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import Session

Row = TypeVar("Row")


def take(session: Session, query: Select[Row], limit: int) -> tuple[list[Row], bool]:
    """Return at most `limit` rows of an ordered query, read anew, and whether more follow."""
    found = list(session.scalars(query.limit(limit + 1).execution_options(populate_existing=True)))
    return found[:limit], len(found) > limit
