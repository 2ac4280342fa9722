"""The audit trail as the documentation shows it."""

from cloud_api.devices.examples import DEVICE_ID, TIME
from cloud_api.operators.examples import KEY_ID
from protocol.operators import AuditEntry
from protocol.pages import Page

ENTRIES = Page[AuditEntry](
    items=[
        AuditEntry(
            sequence=17,
            time=TIME,
            key_id=KEY_ID,
            name="ada",
            action="device.revoke",
            subject=DEVICE_ID,
            outcome="done",
            request_id="5f1c2a9e0b7d4c31",
        )
    ],
    next_cursor="17",
)
