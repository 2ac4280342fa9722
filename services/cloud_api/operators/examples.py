"""Operators' keys as the documentation shows them."""

from cloud_api.devices.examples import TIME
from protocol.operators import OperatorKey, OperatorKeyCreate, OperatorKeyCreated, OperatorRole
from protocol.pages import Page

KEY_ID = "key_0197c0ffee00a1b2c3d4e5f60718"
KEY_REQUEST = OperatorKeyCreate(name="dashboard", role=OperatorRole.VIEWER, expires_in_seconds=2_592_000)
KEY = OperatorKey(
    key_id=KEY_ID,
    name="dashboard",
    role=OperatorRole.VIEWER,
    prefix="cok_mX9dQ1zR",
    created_at=TIME,
    created_by="bootstrap",
    expires_at=TIME,
)
CREATED = OperatorKeyCreated(**KEY.model_dump(), key="cok_mX9dQ1zR…")
KEYS = Page[OperatorKey](items=[KEY], next_cursor=None)
