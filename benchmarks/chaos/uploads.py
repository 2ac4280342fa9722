"""Mutated uploads against the running API of a campaign."""

import time
from typing import Any

import httpx
from sqlalchemy import select
from sqlalchemy.orm import Session

from benchmarks.chaos.campaign import Campaign
from benchmarks.chaos.chunked_mutations import send_in_chunks
from benchmarks.chaos.device import delta
from benchmarks.chaos.mutations import Judge, Tally
from benchmarks.chaos.scenarios import run_config
from benchmarks.chaos.sending import Place, send_mutated
from edge_agent.signing import make_key
from persistence.tables import AssignmentRow, UpdatePartRow
from protocol.assignments import Assignment
from protocol.headers import ADAPTER_FORMAT, METADATA_BASE, METADATA_FORMAT, METADATA_PROBE_SET, METADATA_PROXY

COUNT = 20_000
COUNT_IN_CHUNKS = 500
DEADLINE_SECONDS = 86_400.0
PLACES = 24
"""Assignments for what is to be admitted: each ends with the first part of its kind."""

AT_ONCE, IN_CHUNKS = "at once", "in chunks"
SHOWN = 10


def mutated_uploads(campaign: Campaign, seed: int, until: float) -> dict[str, Any]:
    """Open a round for devices of its own; send `COUNT` spoilt uploads, and as another device spoilt ones in chunks.

    `wrong` lists what must never be: an answer of 5xx, or an upload admitted that the judge refuses.
    """
    cloud, started = campaign.cloud, time.monotonic()
    names = [*(f"mutant {number}" for number in range(PLACES)), IN_CHUNKS]
    enrolled = {name: cloud.enrol(name) for name in names}
    device_ids = [device_id for device_id, _ in enrolled.values()]
    config = run_config("mutated uploads", campaign.files, 1, device_ids=device_ids, min_updates=len(device_ids))
    config["round_deadline_seconds"] = DEADLINE_SECONDS
    run_id = str(cloud.ask("POST", "/v1/runs", json=config)["run_id"])
    logits = (campaign.files / "logits-0.safetensors").read_bytes()
    assignments: list[Assignment] = []
    for name in names:
        with cloud.device_client(name, enrolled[name][1]) as http:
            assignment, adapter = _assignment(campaign, http)
            assignments.append(assignment)
    valid = {"adapter_delta": delta(assignments[0], adapter, 0), "logits": logits}
    judge = Judge(valid, _bound(assignments[0]))
    places = [
        Place(assignment.assignment_id, enrolled[name][1], make_key(cloud.home_of(name)))
        for name, assignment in zip(names[:-1], assignments[:-1], strict=True)
    ]
    with cloud.device_client(IN_CHUNKS, enrolled[IN_CHUNKS][1]) as http:
        chunked = send_in_chunks(http, assignments[-1].assignment_id, valid, judge, COUNT_IN_CHUNKS, seed, until)
    tally = send_mutated(cloud.port, places, valid, judge, COUNT, seed, until)
    parts = cloud.read(_parts_of, run_id)
    if len(parts) != tally.admitted_rightly or assignments[-1].assignment_id in parts:
        tally.wrong.append(f"{tally.admitted_rightly} parts were admitted at once and none in chunks, got {parts}")
    round_shown = cloud.ask("GET", f"/v1/runs/{run_id}/rounds/1")
    statuses = {each["status"] for each in round_shown["devices"]}
    if not statuses <= {"uploading", "offered"}:
        tally.wrong.append(f"assignments are {statuses} after the mutated uploads, not uploading or offered")
    return {
        "sent": tally.sent.total() + chunked.sent.total(),
        "seconds": round(time.monotonic() - started, 1),
        AT_ONCE: _shown(tally),
        IN_CHUNKS: _shown(chunked),
        "wrong": (tally.wrong + chunked.wrong)[:SHOWN],
    }


def _assignment(campaign: Campaign, http: httpx.Client) -> tuple[Assignment, bytes]:
    """Poll until there is one; return it with the adapter that it starts from."""

    def poll() -> Assignment | None:
        answer = http.get("/v1/devices/me/assignment", params={"wait_seconds": 10})
        return Assignment.model_validate_json(answer.content) if answer.status_code == 200 else None

    assignment = campaign.cloud.wait("an assignment", poll)
    assert assignment.adapter is not None
    return assignment, http.get(f"/v1/artifacts/{assignment.adapter.sha256}").content


def _parts_of(session: Session, run_id: str) -> list[str]:
    """Return the assignment of each part that a run has got."""
    query = select(UpdatePartRow.assignment_id).join(AssignmentRow, AssignmentRow.id == UpdatePartRow.assignment_id)
    return list(session.scalars(query.where(AssignmentRow.run_id == run_id)))


def _shown(tally: Tally) -> dict[str, Any]:
    return {
        "by_mutation": dict(tally.sent.most_common()),
        "answers": dict(tally.answers.most_common()),
        "admitted_rightly": tally.admitted_rightly,
        "admitted_wrongly_or_5xx": len(tally.wrong),
        "refused_though_the_judge_admits": dict(tally.stricter.most_common()),
    }


def _bound(assignment: Assignment) -> dict[str, dict[str, str]]:
    assert assignment.adapter is not None
    assert assignment.proxy_manifest is not None
    assert assignment.probe_set is not None
    proxy = assignment.proxy_manifest.sha256
    return {
        "adapter_delta": {
            METADATA_FORMAT: ADAPTER_FORMAT,
            METADATA_BASE: assignment.adapter.sha256,
            METADATA_PROXY: proxy,
        },
        "logits": {METADATA_PROXY: proxy, METADATA_PROBE_SET: assignment.probe_set.sha256},
    }
