"""The base classes of the wire schemas.

The server refuses fields it does not know (a typing mistake must not pass silently); a device ignores them, so that an
old device survives a newer server. So it is with words: see `OpenEnum`. All are frozen: a message is a fact, not a
workspace.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""Lower-case hexadecimal SHA-256 of a file's bytes."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,63}$")]
"""A name a person gives to a device or a run: letters, digits, space, `.`, `_`, `-`; at most 64 characters."""

Timestamp = Annotated[datetime, AwareDatetime, Field(description="UTC, ISO 8601 with offset.")]

MAX_COUNT = 2**53 - 1
"""Largest whole number that a client may send as a count: what every JSON reader and every database can hold."""


_reading_answers = ContextVar("reading_answers", default=False)
_leaving_out = ContextVar("leaving_out", default=False)


@contextmanager
def reading_answers() -> Iterator[None]:
    """Read in the block what a server says that may be newer than this client.

    Only there is an unknown word no error: see `OpenEnum`, `OPEN_WORD` and `ONLY_SHOWN`.
    """
    token = _reading_answers.set(True)
    try:
        yield
    finally:
        _reading_answers.reset(token)


class OpenEnum(StrEnum):
    """Words to which a later version may add.

    A client that reads an answer (`reading_answers`) takes a word that it does not know as it came: it is of the enum's
    type and equal to its text, but none of the members, so that whatever is done for a certain member is not done. For
    everybody else, a server above all, such a word is an error. Rejected: `Enum | str` in the schemas, which would let
    the server too say what is not a word.
    """

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not _reading_answers.get() or not isinstance(value, str):
            return None
        word = str.__new__(cls, value)
        word._name_ = word._value_ = value
        return word


def _as_it_came(value: Any, known: ValidatorFunctionWrapHandler) -> Any:
    try:
        return known(value)
    except ValidationError:
        if _reading_answers.get() and isinstance(value, str):
            return value
        raise


OPEN_WORD = WrapValidator(_as_it_came)
"""Put beside a `Literal` of an answer: the same for it as `OpenEnum` is for an enum."""


def _without_unknown_fields(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    token = _leaving_out.set(_reading_answers.get())
    try:
        return read(value)
    finally:
        _leaving_out.reset(token)


ONLY_SHOWN = WrapValidator(_without_unknown_fields)
"""Put beside a `RequestModel` that is part of an answer and that the client only shows: fields that a newer server has
added to it are left out. Not for what a device acts on: it must not train by half of its settings."""


class RequestModel(BaseModel):
    """What a client sends: frozen, unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_unknown_fields(cls, data: Any) -> Any:
        if _leaving_out.get() and isinstance(data, dict):
            return {name: value for name, value in data.items() if name in cls.model_fields}
        return data


class SettingsModel(RequestModel):
    """What an operator chooses for a run. Kept as JSON and read back, so every number is one that JSON has."""

    model_config = ConfigDict(allow_inf_nan=False)


class ResponseModel(BaseModel):
    """What the server answers: frozen, unknown fields are ignored by the reader."""

    model_config = ConfigDict(frozen=True, extra="ignore")
