"""The event feed: as a list, and as a stream that is resumed and ends."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from protocol.errors import ErrorCode
from protocol.events import Event
from protocol.runs import Run
from tests.cloud_api.running_api import KEY, RunningApi, running_api, settings_in


def frames(response: httpx.Response) -> Iterator[dict[str, str]]:
    """Read a stream as browsers do: fields up to an empty line; a comment's field has no name."""
    frame: dict[str, str] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(":")
            frame[name] = value.strip()
        else:
            yield frame
            frame = {}


def read_events(response: httpx.Response) -> list[Event]:
    events = []
    for frame in frames(response):
        if "data" in frame:
            event = Event.model_validate_json(frame["data"])
            assert (frame["id"], frame["event"]) == (str(event.sequence), event.type.value)
            events.append(event)
    return events


def listed(api: RunningApi, run: Run, **params: int) -> list[Event]:
    page = api.operator.get(f"/v1/runs/{run.run_id}/events", params=params).json()
    return [Event.model_validate(item) for item in page["items"]]


def stop(api: RunningApi, run: Run) -> None:
    assert api.operator.post(f"/v1/runs/{run.run_id}/stop").status_code == 200


def test_events_are_listed_in_order_and_paged(api: RunningApi) -> None:
    run = api.running_run(api.enrol())
    everything = listed(api, run)
    assert [event.sequence for event in everything] == sorted(event.sequence for event in everything)
    assert everything[0].type == "run.created"
    assert {event.run_id for event in everything} == {run.run_id}
    page = api.operator.get(f"/v1/runs/{run.run_id}/events", params={"limit": 2}).json()
    assert page["next_cursor"] == str(everything[1].sequence)
    assert listed(api, run, after=int(page["next_cursor"])) == everything[2:]
    last = api.operator.get(f"/v1/runs/{run.run_id}/events", params={"after": everything[-1].sequence}).json()
    assert last == {"items": [], "next_cursor": None}
    for bad in (-1, 2**63, "x"):
        response = api.operator.get(f"/v1/runs/{run.run_id}/events", params={"after": bad})
        assert response.json()["code"] == ErrorCode.INVALID_FIELD


def test_the_stream_of_a_run_that_is_over_tells_everything_and_ends(api: RunningApi) -> None:
    run = api.running_run(api.enrol())
    stop(api, run)
    with api.operator.stream("GET", f"/v1/runs/{run.run_id}/events/stream") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = read_events(response)
    assert events == listed(api, run)


def test_a_stream_is_resumed_where_it_was_cut(api: RunningApi) -> None:
    run = api.running_run(api.enrol())
    stop(api, run)
    everything = listed(api, run)
    path = f"/v1/runs/{run.run_id}/events/stream"
    headers = {"Last-Event-ID": str(everything[1].sequence)}
    with api.operator.stream("GET", path, headers=headers) as response:
        assert read_events(response) == everything[2:]
    with api.operator.stream("GET", path, params={"after": everything[3].sequence}) as response:
        assert read_events(response) == everything[4:]
    whole = {"Last-Event-ID": str(everything[-1].sequence)}
    assert api.operator.get(path, headers=whole).status_code == 204
    nonsense = api.operator.get(path, headers={"Last-Event-ID": "x"})
    assert nonsense.json()["code"] == ErrorCode.INVALID_FIELD


def test_a_stream_follows_what_happens(api: RunningApi) -> None:
    device = api.enrol()
    run = api.create_run(device_ids=[device.device_id])
    with api.operator.stream("GET", f"/v1/runs/{run.run_id}/events/stream") as response, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_events, response)
        api.prepare(run)  # a worker's commit: no endpoint of this process is called
        device.poll()
        time.sleep(0.3)
        assert not reading.done()
        stop(api, run)
        events = reading.result(10)
    assert events == listed(api, run)
    assert events[-1].run_id == run.run_id


def test_silence_is_filled_with_comments_and_a_stop_ends_the_stream(home: Path) -> None:
    with running_api(settings_in(home, stream_heartbeat_seconds=0.1)) as quiet:
        run = quiet.create_run()
        http = httpx.Client(base_url=quiet.url, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False)
        stream = http.send(http.build_request("GET", f"/v1/runs/{run.run_id}/events/stream"), stream=True)
        reading = frames(stream)
        assert json.loads(next(reading)["retry"]) > 0
        alive = 0
        while alive < 2:
            alive += "" in next(reading)
        started = time.monotonic()
    assert time.monotonic() - started < 4
    list(reading)  # it was ended, not cut
    stream.close()
    http.close()
