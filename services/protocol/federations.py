"""Federations: which devices train together."""

from typing import Annotated

from pydantic import Field, StringConstraints

from protocol.base import RequestModel, ResponseModel, Timestamp

FederationName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
"""Lower-case letters, digits and `-`; it is also the federation's address."""

DEFAULT_FEDERATION = "default"
"""Where devices and runs belong that name no other."""


class FederationCreate(RequestModel):
    """A new federation, without devices."""

    name: FederationName
    description: str = Field(default="", max_length=400)


class FederationChange(RequestModel):
    """What can be changed of a federation."""

    description: str = Field(max_length=400)


class Federation(ResponseModel):
    """A federation as operators see it."""

    name: str
    description: str
    num_devices: int = Field(description="Its devices that are not revoked.")
    num_runs: int
    created_at: Timestamp
