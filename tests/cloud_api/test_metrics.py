"""`/metrics`: what Prometheus reads."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event
from starlette.responses import Response

from cloud_api.cloud import open_cloud
from cloud_api.metrics import show_metrics
from cloud_api.request_metrics import UNMATCHED
from tests.cloud_api.running_api import RunningApi, delta_for, logits, running_api, settings_in

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 30


def metrics(api: RunningApi) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name -> label values in the labels' order -> value."""
    answer = api.client(None).get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_what_happened_is_counted(fresh_api: RunningApi) -> None:
    device = fresh_api.enrol()
    run = fresh_api.running_run(device)
    assignment = device.poll()
    assert assignment is not None
    parts = {"adapter_delta": delta_for(assignment), "logits": logits()}
    for kind, content in parts.items():
        assert device.upload(assignment, kind, content).status_code == 201
    before = metrics(fresh_api)
    assert before["cotune_runs"]["running",] == 1
    assert before["cotune_runs"]["failed",] == 0
    assert before["cotune_devices"]["registered",] == 1
    assert before["cotune_assignments"]["uploading",] == 1
    assert before["cotune_jobs"]["prepare_run", "done"] == 1
    assert before["cotune_bytes_total"]["up", "adapter_delta"] == len(parts["adapter_delta"])
    assert before["cotune_database_up"][()] == 1
    assert device.submit(assignment, parts).status_code == 201
    after = metrics(fresh_api)
    assert after["cotune_rounds"]["aggregating",] == 1
    assert after["cotune_jobs"]["aggregate_round", "queued"] == 1
    assert after["cotune_updates"] == {(each,): 0 for each in ("counted", "quarantined", "rejected", "late", "lost")}
    assert fresh_api.operator.get(f"/v1/runs/{run.run_id}").status_code == 200


def test_requests_are_counted_by_route_and_not_by_path(fresh_api: RunningApi) -> None:
    fresh_api.operator.get("/v1/runs/run_a")
    fresh_api.operator.get("/v1/runs/run_b")
    for path in ("/nowhere", "/elsewhere"):
        fresh_api.client(None).get(path)
    found = metrics(fresh_api)
    assert found["cotune_http_requests_total"]["GET", "/v1/runs/{run_id}", "404"] == 2
    assert found["cotune_http_requests_total"]["any", UNMATCHED, "404"] == 2
    assert found["cotune_http_request_seconds_count"]["GET", "/v1/runs/{run_id}"] == 2


def test_a_database_that_does_not_answer_is_a_number_and_not_an_error(fresh_api: RunningApi) -> None:
    fresh_api.cloud.database.engine.dispose()
    (fresh_api.cloud.settings.home / "cotune.sqlite3").rename(fresh_api.cloud.settings.home / "moved")
    (fresh_api.cloud.settings.home / "cotune.sqlite3").mkdir()
    found = metrics(fresh_api)
    assert found["cotune_database_up"][()] == 0
    assert "cotune_runs" not in found


def test_who_asks_often_does_not_make_the_database_count_often(home: Path) -> None:
    """Nobody needs a credential for it."""
    statements: list[str] = []
    with running_api(settings_in(home, probe_seconds=60)) as api:
        event.listen(api.cloud.database.engine, "before_cursor_execute", lambda *what: statements.append(what[2]))
        with ThreadPoolExecutor(4) as pool:
            assert len(list(pool.map(lambda _: metrics(api), range(12)))) == 12
            assert {pool.submit(api.client(None).get, "/ready").result().status_code for _ in range(12)} == {200}
    assert sum("count(" in each for each in statements) == 5
    assert statements.count("SELECT 1") == 1


def test_the_numbers_come_while_requests_wait_for_their_turn(home: Path) -> None:
    cloud, let_go = open_cloud(settings_in(home)), threading.Event()

    async def busy() -> Response:
        requests = [asyncio.create_task(cloud.read(lambda _: let_go.wait(PATIENCE_SECONDS))) for _ in range(30)]
        try:
            answer = await asyncio.wait_for(show_metrics(cloud), PATIENCE_SECONDS / 2)
            assert not any(each.done() for each in requests)
        finally:
            let_go.set()
            await asyncio.gather(*requests)
        return answer

    answer = asyncio.run(busy())
    cloud.close()
    assert b"\ncotune_database_up 1.0\n" in answer.body


def test_waiting_devices_are_counted(fresh_api: RunningApi) -> None:
    device = fresh_api.enrol()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(device.poll, 5)
        while not waiting.done() and not metrics(fresh_api)["cotune_waiting_devices"][()]:
            pass
        assert not waiting.done()
        assert waiting.result() is None
    assert metrics(fresh_api)["cotune_waiting_devices"][()] == 0
