"""The chaos' plans and scenarios fit together: what is to happen can happen."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import plan as plans
from benchmarks.chaos.plan import (
    CHUNK_REQUESTS,
    IN_FLIGHT,
    LATE_CLAIMED,
    LATE_TAKEN,
    MOMENTS,
    MOVE_MOMENTS,
    Moments,
    moment_of,
)
from benchmarks.chaos.scenarios import MEMBERS, Move, Scenario, late, moved, plain, run_config
from protocol.events import Event, EventType
from protocol.runs import RunCreate
from protocol.statuses import RoundStatus


def event(kind: EventType, data: Mapping[str, Any], round_id: str = "rnd_1") -> Event:
    return Event(sequence=1, type=kind, time=datetime.now(UTC), run_id="run_1", round_id=round_id, data=dict(data))


def run_moved(before: str, to: str) -> Event:
    return event(EventType.RUN_STATUS_CHANGED, {"from": before, "to": to})


@pytest.mark.parametrize(
    ("told", "moment"),
    [
        (run_moved("preparing", "running"), "run running"),
        (run_moved("paused", "running"), "run resumed"),
        (run_moved("failed", "running"), "run retried"),
        (run_moved("running", "paused"), "run paused"),
        (run_moved("running", "stopped"), "run stopped"),
        (event(EventType.RUN_ROLLED_BACK, {"from": 2, "to": 1}), "run rolled back"),
        (event(EventType.ROUND_STATUS_CHANGED, {"from": "open", "to": "abandoned"}), "round abandoned"),
        (event(EventType.UPDATE_SUBMITTED, {"late": True}), "update late"),
        (event(EventType.UPDATE_SUBMITTED, {"late": False}), None),
    ],
)
def test_events_have_their_moments(told: Event, moment: str | None) -> None:
    assert moment_of(told) == moment
    assert moment is None or moment in (*MOMENTS, *MOVE_MOMENTS, "update late")


def test_the_aggregation_of_late_updates_is_a_moment_of_its_own() -> None:
    moments = Moments()

    def closed(round_id: str, reason: str) -> str | None:
        data = {"from": "collecting", "to": "aggregating", "reason": reason}
        return moments.of(event(EventType.ROUND_STATUS_CHANGED, data, round_id))

    def claimed(round_id: str) -> str | None:
        return moments.of(event(EventType.JOB_CLAIMED, {"kind": "aggregate_round"}, round_id))

    assert (closed("rnd_1", "2 updates"), claimed("rnd_1")) == ("round aggregating", "aggregate_round claimed")
    assert (closed("rnd_2", "2 updates; and 1 late one of earlier rounds"), claimed("rnd_2")) == (
        LATE_TAKEN,
        LATE_CLAIMED,
    )


@pytest.mark.parametrize("scenario", [plain(), moved(), late()], ids=lambda each: each.key)
def test_a_scenario_opens_each_gate_once_and_is_a_run(scenario: Scenario) -> None:
    opened = [gate for step in scenario.steps for gate in step.opens]
    assert sorted(opened, key=repr) == sorted(scenario.gates, key=repr)
    assert {gate.device for gate in scenario.gates} <= set(MEMBERS[scenario.federation])
    config = run_config("name", Path("/files"), scenario.rounds, federation=scenario.federation, **scenario.changes)
    assert RunCreate.model_validate(config).llm == "/files/llm"
    numbers = [number for number, _, status, _ in scenario.attempts if status is RoundStatus.PUBLISHED]
    assert numbers == sorted(set(numbers))


def test_every_move_is_made_and_struck_at() -> None:
    made = {move for step in moved().steps for move, _ in step.moves}
    assert made == set(Move)
    for plan in (plans.served_moves_plan(1), plans.embedded_moves_plan(1)):
        moments = {fault.moment for fault in plan.faults}
        assert {f"{move.value} in flight" for move in Move} < moments
        assert set(MOVE_MOMENTS) < moments


def test_every_request_of_an_upload_in_chunks_is_struck_at_and_spoilt() -> None:
    assert set(CHUNK_REQUESTS) < set(IN_FLIGHT)
    for plan in (plans.served_plan(1), plans.embedded_plan(1)):
        moments = {fault.moment for fault in plan.faults}
        for kind in CHUNK_REQUESTS:
            assert {f"{kind} in flight", f"{kind} request"} < moments
    assert "chunk in flight" in {fault.moment for fault in plans.full_disk_plan(1).faults}
