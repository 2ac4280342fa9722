"""Mutated uploads against the running API of a campaign."""

import time
from typing import Any

from benchmarks.chaos.campaign import Campaign, run_config
from benchmarks.chaos.device import delta
from benchmarks.chaos.mutations import Judge, digest_of, send_mutated
from protocol.assignments import Assignment
from protocol.headers import ADAPTER_FORMAT, METADATA_BASE, METADATA_FORMAT, METADATA_PROBE_SET, METADATA_PROXY

COUNT = 20_000
SHOWN = 10


def mutated_uploads(campaign: Campaign, seed: int, until: float) -> dict[str, Any]:
    """Open a round for one device, upload its valid parts, then `COUNT` spoilt ones; return what came of them.

    `wrong` lists what must never be: an answer of 5xx, or an upload admitted that the judge refuses.
    """
    cloud, started = campaign.cloud, time.monotonic()
    device_id, credential = cloud.enrol("mutant")
    config = run_config("mutated uploads", campaign.files, 1, device_ids=[device_id], min_updates=1)
    run_id = cloud.ask("POST", "/v1/runs", json=config)["run_id"]
    with cloud.client(credential) as http:
        answer = cloud.wait(
            "an assignment",
            lambda: http.get("/v1/devices/me/assignment", params={"wait_seconds": 10}) or None,
        )
        while answer.status_code == 204:
            answer = http.get("/v1/devices/me/assignment", params={"wait_seconds": 10})
        assignment = Assignment.model_validate_json(answer.content)
        assert assignment.adapter is not None
        adapter = http.get(f"/v1/artifacts/{assignment.adapter.sha256}").content
        logits = (campaign.files / "logits-0.safetensors").read_bytes()
        valid = {"adapter_delta": delta(assignment, adapter, 0), "logits": logits}
        for kind, content in valid.items():
            path = f"/v1/assignments/{assignment.assignment_id}/parts/{kind}"
            stored = http.put(path, content=content, headers={"Content-Digest": digest_of(content)})
            assert stored.status_code == 201, stored.text
    judge = Judge(valid, _bound(assignment))
    tally = send_mutated(cloud.port, credential, assignment.assignment_id, valid, judge, COUNT, seed, until)
    round_shown = cloud.ask("GET", f"/v1/runs/{run_id}/rounds/1")
    statuses = {each["status"] for each in round_shown["devices"]}
    if statuses != {"uploading"}:
        tally.wrong.append(f"the assignment is {statuses} after the mutated uploads, not uploading")
    return {
        "sent": tally.sent.total(),
        "seconds": round(time.monotonic() - started, 1),
        "by_mutation": dict(tally.sent.most_common()),
        "answers": dict(tally.answers.most_common()),
        "admitted_rightly": tally.admitted_rightly,
        "admitted_wrongly_or_5xx": len(tally.wrong),
        "refused_though_the_judge_admits": dict(tally.stricter.most_common()),
        "wrong": tally.wrong[:SHOWN],
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
