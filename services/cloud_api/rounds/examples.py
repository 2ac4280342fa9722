"""Rounds as the documentation shows them."""

from cloud_api.devices.examples import DEVICE_ID, TIME
from cloud_api.runs.examples import RUN_ID
from protocol.pages import Page
from protocol.runs import Round, RoundDevice
from protocol.statuses import AssignmentStatus, RoundStatus

ROUND_ID = "rnd_0197c0ffee00a1b2c3d4e5f60718"
ASSIGNMENT_ID = "asg_0197c0ffee00a1b2c3d4e5f60718"

ROUND = Round(
    round_id=ROUND_ID,
    run_id=RUN_ID,
    number=1,
    status=RoundStatus.COLLECTING,
    status_reason="waits for 2 more updates",
    base_version=0,
    devices=[
        RoundDevice(
            assignment_id=ASSIGNMENT_ID,
            device_id=DEVICE_ID,
            device_name="kitchen-pi",
            status=AssignmentStatus.TRAINING,
            stage="mutual_learning",
            step=12,
            steps=60,
            losses={"slm_ce": 1.93, "proxy_ce": 2.41},
            offered_at=TIME,
        )
    ],
    opened_at=TIME,
    deadline_at=TIME,
)
ROUNDS = Page[Round](items=[ROUND], next_cursor=None)
