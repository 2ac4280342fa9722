"""One page of a list: as many rows as asked for, and whether there are more."""

import re
from typing import TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import Session

from protocol.errors import DomainError, ErrorCode

Row = TypeVar("Row")


def take(session: Session, query: Select[Row], limit: int) -> tuple[list[Row], bool]:
    """Return at most `limit` rows of an ordered query, read anew, and whether more follow."""
    found = list(session.scalars(query.limit(limit + 1).execution_options(populate_existing=True)))
    return found[:limit], len(found) > limit


def id_cursor(cursor: str, prefix: str) -> str:
    """Return a cursor that is an id of this kind; made-up text would start somewhere, and look like a page.

    Raises:
        DomainError: INVALID_FIELD.
    """
    return checked_cursor(cursor, prefix + "_[0-9a-f]{28}")


def checked_cursor(cursor: str, pattern: str) -> str:
    """Return a cursor of the form in which its list gives them out. Raises as `id_cursor`."""
    if not re.fullmatch(pattern, cursor):
        detail = f"`cursor` must be a `next_cursor` of this list ({pattern}), got {cursor[:40]!r}"
        raise DomainError(ErrorCode.INVALID_FIELD, detail, expected=pattern, received=cursor[:40])
    return cursor
