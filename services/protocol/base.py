"""The base classes of the wire schemas.

The server refuses fields it does not know (a typing mistake must not pass silently); a device ignores them, so that an
old device survives a newer server. All are frozen: a message is a fact, not a workspace.
"""

from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""Lower-case hexadecimal SHA-256 of a file's bytes."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,63}$")]
"""A name a person gives to a device or a run: letters, digits, space, `.`, `_`, `-`; at most 64 characters."""

Timestamp = Annotated[datetime, AwareDatetime, Field(description="UTC, ISO 8601 with offset.")]

MAX_COUNT = 2**53 - 1
"""Largest whole number that a client may send as a count: what every JSON reader and every database can hold."""


class RequestModel(BaseModel):
    """What a client sends: frozen, unknown fields are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SettingsModel(RequestModel):
    """What an operator chooses for a run. Kept as JSON and read back, so every number is one that JSON has."""

    model_config = ConfigDict(allow_inf_nan=False)


class ResponseModel(BaseModel):
    """What the server answers: frozen, unknown fields are ignored by the reader."""

    model_config = ConfigDict(frozen=True, extra="ignore")
