"""The agent against a cloud that is newer: words that it does not know neither stop it nor lose an update."""

from pathlib import Path
from typing import Any

import pytest

from edge_agent import cycle
from edge_agent.client import CloudClient
from edge_agent.cycle import Agent, Outcome
from edge_agent.errors import CloudRefused, CloudUnavailable
from edge_agent.outbox import Outbox
from protocol.assignments import AssignmentRefusal
from tests.contracts.newer_server import FIELD, WORD
from tests.edge_agent.conftest import make_assignment
from tests.edge_agent.fake_cloud import FakeCloud, Fault, Handler, problem

POLL = "GET /v1/devices/me/assignment"


def saying(status: int, answer: dict[str, Any]) -> Fault:
    def answer_so(handler: Handler) -> None:
        handler.send_json(status, answer)

    return answer_so


def test_an_assignment_in_a_status_of_tomorrow_is_worked_on_and_its_update_outlives_a_restart(
    tmp_path: Path, agent: Agent, cloud: FakeCloud
) -> None:
    told = make_assignment(cloud).model_dump(mode="json") | {"status": WORD, FIELD: 1}
    cloud.fail(POLL, saying(200, told))
    cloud.fail("/progress", saying(200, {"status": WORD, FIELD: 1}), times=9)
    kept: list[str] = []

    def keep_then_receive(handler: Handler) -> None:
        # What the outbox holds now is what a restarted agent finds.
        (waiting,) = Outbox(tmp_path / "outbox").pending()
        kept.append(waiting.assignment.status)
        body = {"assignment_id": "asg_1", "round_id": "rnd_1", "update_sha256": "0" * 64, "counts_in": WORD}
        handler.send_json(201, body | {"received_at": "2026-03-01T12:00:00Z"})

    cloud.fail("/submission", keep_then_receive)
    assert cycle.run_once(agent) is Outcome.SUBMITTED
    assert kept == [WORD]


def test_an_assignment_that_asks_for_a_part_of_tomorrow_is_refused_with_the_reason(
    agent: Agent, cloud: FakeCloud
) -> None:
    told = make_assignment(cloud).model_dump(mode="json")
    cloud.fail(POLL, saying(200, told | {"uploads": [WORD], "upload_limits": {WORD: 5}}))
    assert cycle.run_once(agent) is Outcome.REFUSED
    (refused,) = cloud.requests("/refusal")
    refusal = AssignmentRefusal.model_validate_json(refused.body)
    assert refusal.code == "undeclared_upload"
    assert WORD in refusal.reason


def test_a_setting_of_tomorrow_is_not_left_out_of_what_a_device_acts_on(client: CloudClient, cloud: FakeCloud) -> None:
    told = make_assignment(cloud).model_dump(mode="json")
    cloud.fail(POLL, saying(200, told | {"strategy": told["strategy"] | {FIELD: 1}}))
    with pytest.raises(CloudUnavailable, match=FIELD):
        client.next_assignment(0)


def test_a_refusal_with_a_code_of_tomorrow_is_a_definite_no(client: CloudClient, cloud: FakeCloud) -> None:
    cloud.fail(POLL, problem(409, WORD, "said tomorrow"))
    with pytest.raises(CloudRefused) as refused:
        client.next_assignment(0)
    assert (refused.value.code, refused.value.detail) == (WORD, "said tomorrow")
