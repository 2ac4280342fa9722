"""Enrolment, devices and heartbeats."""

from typing import Annotated

from pydantic import Field, StringConstraints

from protocol.base import Name, RequestModel, ResponseModel, Timestamp
from protocol.federations import DEFAULT_FEDERATION, FederationName
from protocol.statuses import DeviceStatus

PublicKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$")]
"""The 32 bytes of an Ed25519 public key, base64. The pattern leaves exactly one spelling of each key."""


class EnrolmentTokenCreate(RequestModel):
    """Ask for a token that lets devices enrol."""

    uses: int = Field(default=1, ge=1, le=100_000, description="How many devices may enrol with it.")
    expires_in_seconds: int = Field(default=86_400, ge=60, le=31_536_000)
    note: str = Field(default="", max_length=200, description="For the operator; never shown to devices.")
    approval: bool = Field(default=False, description="Whether its devices wait until an operator approves them.")
    federations: list[FederationName] = Field(
        default=[DEFAULT_FEDERATION], min_length=1, max_length=32, description="Which its devices will belong to."
    )


class EnrolmentToken(ResponseModel):
    """A new token. Its secret is shown this once; the server keeps a hash."""

    token_id: str
    token: str = Field(description="Give this to the device's owner.")
    uses: int
    expires_at: Timestamp
    approval: bool = False


class EnrolmentTokenState(ResponseModel):
    """A token as operators see it later, without its secret."""

    token_id: str
    note: str
    uses: int
    used: int
    approval: bool
    created_at: Timestamp
    expires_at: Timestamp
    revoked_at: Timestamp | None = None


class DeviceProfile(RequestModel):
    """What a device says about itself. Numbers and names, never data."""

    agent_version: str = Field(max_length=64)
    platform: str = Field(max_length=128, description="Operating system and machine type.")
    cpu_count: int = Field(ge=1, le=4096)
    memory_bytes: int = Field(ge=0)
    accelerator: str | None = Field(default=None, max_length=128)
    model_name: str = Field(max_length=200, description="The SLM's folder name or hub name, for the operator's table.")
    model_architecture: str = Field(max_length=64, description="`model_type` of the SLM's config, e.g. `gpt2`.")
    model_parameters: int = Field(ge=0)
    tokenizer_kind: str = Field(max_length=128, description="For example `byte-level BPE, 1024 tokens`.")
    domain: str | None = Field(default=None, max_length=64, description="A label the owner chose for the data.")
    num_examples: int = Field(ge=0, description="Private training rows on the device.")
    max_adapter_rank: int | None = Field(
        default=None, ge=1, le=1024, description="Highest rank at which the device trains a shared adapter; null: any."
    )


class EnrolmentRequest(RequestModel):
    """A device enrols."""

    token: str = Field(min_length=8, max_length=256)
    name: Name
    profile: DeviceProfile
    public_key: PublicKey | None = Field(
        default=None,
        description="Ed25519, base64. With it every later request must be signed (RFC 9421) with the private key.",
    )


class EnrolmentReceipt(ResponseModel):
    """The device's identity. The credential is shown this once; the server keeps a hash."""

    device_id: str
    credential: str = Field(description="Send as `Authorization: Bearer <credential>`.")
    status: DeviceStatus


class DeviceCredential(ResponseModel):
    """A new credential of the calling device. The one before it is void as soon as this one is used."""

    device_id: str
    credential: str = Field(description="Send as `Authorization: Bearer <credential>`. It is shown this once.")


class Heartbeat(RequestModel):
    """A device is alive; sent between polls and while it trains."""

    profile: DeviceProfile | None = Field(default=None, description="Only when it changed.")
    activity: str = Field(default="idle", max_length=64, description="`idle`, `training`, `uploading`, `waiting`.")
    reason: str | None = Field(default=None, max_length=400, description="Why the device does not train, if so.")


class HeartbeatReceipt(ResponseModel):
    """The server's clock and how soon it wants to hear from the device again."""

    server_time: Timestamp
    next_within_seconds: int


class Device(ResponseModel):
    """A device as operators see it."""

    device_id: str
    name: str
    status: DeviceStatus
    profile: DeviceProfile
    activity: str
    reason: str | None = None
    federations: list[str] = Field(default_factory=list)
    enrolled_at: Timestamp
    last_seen_at: Timestamp
    public_key: str | None = Field(default=None, description="Ed25519, base64; null: its requests are not signed.")
