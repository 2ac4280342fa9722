"""Operators: their roles, their API keys, and the trail of what they did."""

from enum import StrEnum
from typing import Any

from pydantic import Field

from protocol.base import Name, RequestModel, ResponseModel, Timestamp


class OperatorRole(StrEnum):
    """What an operator may do; each role may do what those before it may."""

    VIEWER = "viewer"  # Reads runs, rounds, versions, devices, events.
    OPERATOR = "operator"  # Also starts and stops runs, lets devices in, approves and revokes them.
    ADMIN = "admin"  # Also makes and revokes operators' keys, and reads the audit trail.

    def includes(self, other: "OperatorRole") -> bool:
        """Return whether this role may do what `other` may."""
        order = list(OperatorRole)
        return order.index(self) >= order.index(other)


class OperatorKeyCreate(RequestModel):
    """Ask for an API key for an operator."""

    name: Name = Field(description="Whose key it is: a person or a program. It need not be unique.")
    role: OperatorRole = OperatorRole.VIEWER
    expires_in_seconds: int | None = Field(
        default=7_776_000, ge=60, le=315_360_000, description="90 days if absent; null: until it is revoked."
    )


class OperatorKey(ResponseModel):
    """An operator's API key, without its secret."""

    key_id: str
    name: str
    role: OperatorRole
    prefix: str = Field(description="How the key begins, to tell keys apart.")
    created_at: Timestamp
    created_by: str = Field(description="Id of the key that made it.")
    expires_at: Timestamp | None = None
    revoked_at: Timestamp | None = None


class OperatorKeyCreated(OperatorKey):
    """A new key. Its secret is shown this once; the server keeps a hash."""

    key: str = Field(description="Send as `Authorization: Bearer <key>`.")


class AuditEntry(ResponseModel):
    """One thing that an operator did, or tried to do."""

    sequence: int
    time: Timestamp
    key_id: str = Field(description="Who: the id of the operator's key; `bootstrap` is that of the server's settings.")
    name: str = Field(description="The key's name.")
    action: str = Field(description="What, for example `device.revoke`.")
    subject: str | None = Field(default=None, description="The id of what it was done to, or of what it made.")
    outcome: str = Field(description="`done`, or the code of the error that it ended in.")
    request_id: str = Field(description="Also in the `X-Request-ID` header and the server's logs.")
    data: dict[str, Any] = Field(default_factory=dict, description="Particulars, never a secret.")
