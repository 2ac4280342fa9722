"""Events as the documentation shows them."""

from cloud_api.devices.examples import DEVICE_ID, TIME
from cloud_api.rounds.examples import ASSIGNMENT_ID, ROUND_ID
from cloud_api.runs.examples import RUN_ID
from protocol.events import Event, EventType
from protocol.pages import Page

EVENT = Event(
    sequence=42,
    type=EventType.ASSIGNMENT_STATUS_CHANGED,
    time=TIME,
    run_id=RUN_ID,
    round_id=ROUND_ID,
    device_id=DEVICE_ID,
    data={"assignment_id": ASSIGNMENT_ID, "from": "uploading", "to": "submitted", "reason": None},
)
EVENTS = Page[Event](items=[EVENT], next_cursor="42")
STREAM = f"retry: 2000\n\nid: 42\nevent: {EVENT.type}\ndata: {EVENT.model_dump_json()}\n\n: alive\n\n"
