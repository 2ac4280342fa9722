"""Whatever goes wrong, the answer is a problem with a stable code, and says nothing of the inside."""

import httpx
import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from protocol.errors import ErrorCode, Problem
from protocol.strategies import STRATEGIES
from tests.cloud_api.running_api import KEY, RunningApi, eventually, raw_request


def problem_of(response: httpx.Response, code: ErrorCode, status: int) -> Problem:
    assert response.headers["Content-Type"] == "application/problem+json", response.text
    problem = Problem.model_validate_json(response.content)
    assert (problem.code, response.status_code, problem.status) == (code, status, status), response.text
    assert problem.type == f"/problems/{code.value}"
    assert problem.request_id == response.headers["X-Request-ID"]
    return problem


def test_unknown_paths_and_methods(api: RunningApi) -> None:
    problem_of(api.operator.get("/v1/nothing"), ErrorCode.NOT_FOUND, 404)
    problem_of(api.operator.get("/v1/runs/"), ErrorCode.NOT_FOUND, 404)
    response = api.operator.delete("/v1/runs")
    problem = problem_of(response, ErrorCode.METHOD_NOT_ALLOWED, 405)
    assert response.headers["Allow"]
    assert "DELETE" in problem.detail


def test_a_method_that_is_not_allowed_is_told_every_one_that_is(api: RunningApi) -> None:
    for path, allowed in (("/v1/runs", "GET, POST"), ("/v1/webhooks/whk_1", "DELETE, GET"), ("/ready", "GET")):
        assert api.operator.request("PATCH", path).headers["Allow"] == allowed


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"uses": NaN}', b'{"uses": -Infinity}', b"\xff\xfe{}", b"[" * 100_000, b'"' + b"9" * 5000]
)
def test_a_body_that_is_not_json(api: RunningApi, body: bytes) -> None:
    response = api.operator.post("/v1/runs", content=body, headers={"Content-Type": "application/json"})
    if body == b"":
        assert problem_of(response, ErrorCode.INVALID_FIELD, 422).errors[0].field == "body"
    else:
        problem_of(response, ErrorCode.MALFORMED_REQUEST, 400)


@pytest.mark.parametrize("media_type", ["text/plain", "application/xml", None])
def test_a_body_of_another_type(api: RunningApi, media_type: str | None) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    response = api.operator.post("/v1/runs", content=b"{}", headers=headers)
    problem = problem_of(response, ErrorCode.MALFORMED_REQUEST, 400)
    assert "application/json" in problem.detail


@pytest.mark.parametrize("body", ["[]", '"x"', "1", "null"])
def test_json_that_is_no_object(api: RunningApi, body: str) -> None:
    response = api.operator.post("/v1/runs", content=body, headers={"Content-Type": "application/json"})
    problem_of(response, ErrorCode.INVALID_FIELD, 422)


def test_wrong_fields_are_named_with_what_was_expected_and_what_came(api: RunningApi) -> None:
    body = {"name": "a/b", "strategy": {"name": "co_plms", "alpha": -1}, "rounds": 0, "roundz": 3, "llm": "x" * 5000}
    problem = problem_of(api.operator.post("/v1/runs", json=body), ErrorCode.INVALID_FIELD, 422)
    found = {each.field: each for each in problem.errors}
    assert set(found) == {"name", "strategy.alpha", "rounds", "roundz", "llm"}
    assert "greater than or equal to 1" in found["rounds"].message
    assert found["rounds"].received == 0
    assert found["strategy.alpha"].received == -1
    assert len(found["llm"].received) < 300


def test_a_field_that_is_misspelt_is_told_in_plain_words(api: RunningApi) -> None:
    problem = problem_of(api.operator.post("/v1/runs", json={"name": 3, "rouns": 2}), ErrorCode.INVALID_FIELD, 422)
    said = {each.field: each.message for each in problem.errors}
    assert said["rouns"] == "there is no such field"
    assert said["rounds"] == "expected a value, got none"
    assert "rouns: there is no such field, got 2" in problem.detail
    assert problem.detail.count("name: ") == 1


def test_a_secret_is_not_given_back(api: RunningApi) -> None:
    body = {"token": "s3cret", "name": "x", "profile": {"token": "s3cret"}}
    response = api.client(None).post("/v1/devices", json=body)
    problem_of(response, ErrorCode.INVALID_FIELD, 422)
    assert "s3cret" not in response.text


def test_half_a_surrogate_pair_and_a_nul_are_refused_and_not_a_fault(api: RunningApi) -> None:
    for name in ('"\\ud800"', '"a\\u0000b"'):
        content = f'{{"uses": 1, "note": {name}, "\\ud801": 1}}'
        response = api.operator.post(
            "/v1/enrolment-tokens", content=content, headers={"Content-Type": "application/json"}
        )
        problem_of(response, ErrorCode.INVALID_FIELD, 422)


def test_a_body_that_is_too_large(api: RunningApi) -> None:
    body = b'{"name": "' + b"x" * 2**20 + b'"}'
    for content in (body, iter([body[:100], body[100:]])):  # with `Content-Length`, and chunked without
        response = api.operator.post("/v1/runs", content=content, headers={"Content-Type": "application/json"})
        problem_of(response, ErrorCode.BODY_TOO_LARGE, 413)


def test_an_unknown_strategy_is_told_the_known_ones(api: RunningApi) -> None:
    body = {"name": "x", "strategy": {"name": "fedavg"}, "rounds": 1}
    problem = problem_of(api.operator.post("/v1/runs", json=body), ErrorCode.UNKNOWN_STRATEGY, 422)
    assert problem.expected == sorted(STRATEGIES)
    assert problem.received == "fedavg"


def test_an_unknown_protocol_version_is_refused_everywhere(api: RunningApi) -> None:
    for path in ("/health", "/v1/runs", "/nothing"):
        response = api.operator.get(path, headers={"Cotune-Protocol": "99"})
        assert "99" in problem_of(response, ErrorCode.UNSUPPORTED_PROTOCOL, 400).detail
    assert api.operator.get("/health", headers={"Cotune-Protocol": "1"}).headers["Cotune-Protocol"] == "1"


def test_the_request_id_is_the_clients_if_it_is_harmless(api: RunningApi) -> None:
    given = api.operator.get("/health", headers={"X-Request-ID": "walk-7"})
    assert given.headers["X-Request-ID"] == "walk-7"
    other = api.operator.get("/health", headers={"X-Request-ID": "bad id with spaces"})
    assert other.headers["X-Request-ID"] not in {"bad id with spaces", ""}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/runs/run_0", ErrorCode.RUN_NOT_FOUND),
        ("/v1/runs/run_0/rounds", ErrorCode.RUN_NOT_FOUND),
        ("/v1/runs/run_0/rounds/1", ErrorCode.RUN_NOT_FOUND),
        ("/v1/runs/run_0/events", ErrorCode.RUN_NOT_FOUND),
        ("/v1/runs/run_0/events/stream", ErrorCode.RUN_NOT_FOUND),
        ("/v1/runs/run_0/traffic", ErrorCode.RUN_NOT_FOUND),
        ("/v1/runs/run_0/versions", ErrorCode.RUN_NOT_FOUND),
        ("/v1/runs/run_0/versions/0", ErrorCode.RUN_NOT_FOUND),
        ("/v1/runs/run_0/versions/0/adapters/llm", ErrorCode.RUN_NOT_FOUND),
        ("/v1/runs/%00%FF%0A", ErrorCode.RUN_NOT_FOUND),
        ("/v1/devices/dev_0", ErrorCode.DEVICE_NOT_FOUND),
        (f"/v1/artifacts/{'0' * 64}", ErrorCode.ARTIFACT_NOT_FOUND),
    ],
)
def test_what_is_not_there(api: RunningApi, path: str, code: ErrorCode) -> None:
    problem_of(api.operator.get(path), code, 404)


def test_a_commit_that_fails_is_an_error_and_keeps_nothing(fresh_api: RunningApi) -> None:
    def fail(_session: Session) -> None:
        raise RuntimeError("the disk is on fire: /secret/path")

    event.listen(Session, "before_commit", fail)
    try:
        response = fresh_api.operator.post("/v1/enrolment-tokens", json={})
    finally:
        event.remove(Session, "before_commit", fail)
    problem = problem_of(response, ErrorCode.INTERNAL_ERROR, 500)
    assert "fire" not in response.text
    assert problem.request_id is not None
    assert problem.request_id in problem.detail
    assert fresh_api.operator.get("/v1/runs").json()["items"] == []


def test_a_fault_tells_its_request_id_and_no_more(fresh_api: RunningApi) -> None:
    fresh_api.cloud.database.engine.dispose()
    with fresh_api.cloud.database.transaction() as session:
        session.connection().exec_driver_sql("ALTER TABLE runs RENAME COLUMN name TO title")
    response = fresh_api.operator.get("/v1/runs")
    assert response.status_code >= 500
    assert "SELECT" not in response.text
    assert KEY not in response.text


def test_what_a_terminal_would_obey_is_not_logged(api: RunningApi) -> None:
    """Nobody needs a credential to send a path."""
    with capture_logs() as logs:
        assert raw_request(api.url, b"GET /%1b[2J%0afine HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", close=False)
        eventually(lambda: logs)
    (line,) = (each for each in logs if each["event"] == "request")
    assert line["path"] == "/%1b[2J%0afine"
