"""Lists with a cursor."""

from typing import Generic, TypeVar

from pydantic import Field

from protocol.base import ResponseModel

Item = TypeVar("Item")


class Page(ResponseModel, Generic[Item]):
    """One page of a list."""

    items: list[Item]
    next_cursor: str | None = Field(default=None, description="Give it back as `cursor`; null on the last page.")
