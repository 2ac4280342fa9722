"""Health and readiness."""

from typing import Literal

from pydantic import Field

from protocol.base import ResponseModel


class Health(ResponseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"
    version: str
    protocol: str


class Readiness(ResponseModel):
    """Whether the service can do its work, dependency by dependency."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str] = Field(description="Dependency -> `ok` or what is wrong.")
