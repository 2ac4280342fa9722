"""Devices as the documentation shows them."""

from datetime import UTC, datetime

from protocol.devices import (
    Device,
    DeviceCredential,
    DeviceProfile,
    EnrolmentReceipt,
    EnrolmentRequest,
    EnrolmentToken,
    EnrolmentTokenCreate,
    EnrolmentTokenState,
    Heartbeat,
    HeartbeatReceipt,
)
from protocol.pages import Page
from protocol.statuses import DeviceStatus

TIME = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
DEVICE_ID = "dev_0197c0ffee00a1b2c3d4e5f60718"

PROFILE = DeviceProfile(
    agent_version="0.1.0",
    platform="Linux aarch64",
    cpu_count=4,
    memory_bytes=8 * 2**30,
    model_name="HuggingFaceTB/SmolLM2-135M",
    model_architecture="llama",
    model_parameters=134_515_008,
    tokenizer_kind="byte-level BPE, 49152 tokens",
    domain="finance",
    num_examples=1200,
)
TOKEN_REQUEST = EnrolmentTokenCreate(uses=3, expires_in_seconds=86_400, note="the three kitchens")
TOKENS = Page[EnrolmentTokenState](
    items=[
        EnrolmentTokenState(
            token_id="tok_0197c0ffee00",
            note="the three kitchens",
            uses=3,
            used=1,
            approval=False,
            created_at=TIME,
            expires_at=TIME,
        )
    ],
    next_cursor=None,
)
TOKEN = EnrolmentToken(token_id="tok_0197c0ffee00", token="mX9…", uses=3, expires_at=TIME)
PUBLIC_KEY = "JrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs="
ENROLMENT = EnrolmentRequest(
    token="the token that the operator gave", name="kitchen-pi", profile=PROFILE, public_key=PUBLIC_KEY
)
CREDENTIAL = DeviceCredential(device_id=DEVICE_ID, credential=f"{DEVICE_ID}.another secret")
RECEIPT = EnrolmentReceipt(device_id=DEVICE_ID, credential=f"{DEVICE_ID}.secret", status=DeviceStatus.REGISTERED)
DEVICE = Device(
    device_id=DEVICE_ID,
    name="kitchen-pi",
    status=DeviceStatus.REGISTERED,
    profile=PROFILE,
    activity="idle",
    federations=["default"],
    enrolled_at=TIME,
    last_seen_at=TIME,
    public_key=PUBLIC_KEY,
)
DEVICES = Page[Device](items=[DEVICE], next_cursor=None)
HEARTBEAT = Heartbeat(activity="idle", reason="on battery")
HEARTBEAT_RECEIPT = HeartbeatReceipt(server_time=TIME, next_within_seconds=30)
