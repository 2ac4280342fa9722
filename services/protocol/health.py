"""Health and readiness."""

from typing import Annotated, Literal

from pydantic import Field

from protocol.base import OPEN_WORD, ResponseModel


class Health(ResponseModel):
    """The process answers."""

    status: Annotated[Literal["ok"], OPEN_WORD] = "ok"
    version: str
    protocol: str


class Readiness(ResponseModel):
    """Whether the service can do its work, dependency by dependency."""

    status: Annotated[Literal["ready", "not_ready"], OPEN_WORD]
    checks: dict[str, str] = Field(description="Dependency -> `ok` or what is wrong.")
