"""The document at `/openapi.json`: every operation says what it does, what it answers and how it fails."""

import re
from typing import Any

import pytest
from jsonschema_rs import validator_for

from cloud_api.release import VERSION
from protocol.errors import HTTP_STATUS, ErrorCode, Problem
from tests.cloud_api.running_api import RunningApi

PUBLIC = {"/health", "/ready", "/metrics", "/v1/devices"}
"""Paths on which at least one operation needs no credential."""

PATHS = {
    "/health": {"get"},
    "/ready": {"get"},
    "/metrics": {"get"},
    "/v1/enrolment-tokens": {"get", "post"},
    "/v1/enrolment-tokens/{token_id}": {"delete"},
    "/v1/devices": {"get", "post"},
    "/v1/devices/me": {"get"},
    "/v1/devices/me/heartbeat": {"post"},
    "/v1/devices/me/credential": {"post"},
    "/v1/devices/me/assignment": {"get"},
    "/v1/devices/{device_id}": {"get"},
    "/v1/devices/{device_id}/approve": {"post"},
    "/v1/devices/{device_id}/revoke": {"post"},
    "/v1/assignments/{assignment_id}/progress": {"post"},
    "/v1/assignments/{assignment_id}/refusal": {"post"},
    "/v1/assignments/{assignment_id}/last-step": {"get"},
    "/v1/assignments/{assignment_id}/parts/{kind}": {"put"},
    "/v1/assignments/{assignment_id}/parts/{kind}/uploads": {"post"},
    "/v1/assignments/{assignment_id}/parts/{kind}/uploads/{upload_id}": {"get", "patch"},
    "/v1/assignments/{assignment_id}/parts/{kind}/uploads/{upload_id}/completion": {"post"},
    "/v1/assignments/{assignment_id}/submission": {"get", "post"},
    "/v1/artifacts/{sha256}": {"get", "head"},
    "/v1/runs": {"get", "post"},
    "/v1/runs/{run_id}": {"get"},
    "/v1/runs/{run_id}/stop": {"post"},
    "/v1/runs/{run_id}/pause": {"post"},
    "/v1/runs/{run_id}/resume": {"post"},
    "/v1/runs/{run_id}/retry": {"post"},
    "/v1/runs/{run_id}/rollback": {"post"},
    "/v1/runs/{run_id}/traffic": {"get"},
    "/v1/runs/{run_id}/rounds": {"get"},
    "/v1/runs/{run_id}/rounds/{number}": {"get"},
    "/v1/runs/{run_id}/events": {"get"},
    "/v1/runs/{run_id}/events/stream": {"get"},
    "/v1/webhooks": {"get", "post"},
    "/v1/webhooks/{webhook_id}": {"get", "delete"},
    "/v1/webhooks/{webhook_id}/resume": {"post"},
    "/v1/runs/{run_id}/versions": {"get"},
    "/v1/runs/{run_id}/versions/{number}": {"get"},
    "/v1/runs/{run_id}/versions/{number}/model-card": {"get"},
    "/v1/runs/{run_id}/versions/{number}/adapters/{adapter}": {"get"},
    "/v1/runs/{run_id}/versions/{number}/adapters/{adapter}/package": {"get"},
    "/v1/federations": {"get", "post"},
    "/v1/federations/{federation}": {"get", "patch", "delete"},
    "/v1/federations/{federation}/devices/{device_id}": {"put", "delete"},
    "/v1/operators/keys": {"get", "post"},
    "/v1/operators/keys/{key_id}": {"delete"},
    "/v1/audit": {"get"},
}
ALWAYS = {
    ErrorCode.INVALID_FIELD,
    ErrorCode.UNSUPPORTED_PROTOCOL,
    ErrorCode.RATE_LIMITED,
    ErrorCode.INTERNAL_ERROR,
    ErrorCode.UNAVAILABLE,
}


@pytest.fixture(scope="module")
def document(api: RunningApi) -> dict[str, Any]:
    answer: dict[str, Any] = api.client(None).get("/openapi.json").json()
    return answer


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_the_paths_are_the_published_ones(document: dict[str, Any]) -> None:
    assert {path: set(methods) for path, methods in document["paths"].items()} == PATHS


def test_the_document_names_its_version_tags_and_credentials(document: dict[str, Any], api: RunningApi) -> None:
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == VERSION
    assert document["info"]["description"]
    described = {tag["name"] for tag in document["tags"] if tag["description"]}
    used = {tag for operation in operations(document).values() for tag in operation["tags"]}
    assert used == described
    schemes = document["components"]["securitySchemes"]
    assert {name: scheme["scheme"] for name, scheme in schemes.items()} == {
        "operator key": "bearer",
        "device credential": "bearer",
    }


def test_every_operation_says_what_it_does_and_who_may(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        assert operation["summary"], name
        assert len(operation["description"]) > 20, name
        assert operation["tags"], name
        if not operation.get("security"):
            assert name.split()[1] in PUBLIC, f"{name} needs no credential"
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), f"{name}: {parameter['name']}"


def test_every_operation_shows_an_example_of_what_it_takes_and_answers(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        for media in operation.get("requestBody", {}).get("content", {}).values():
            schema = media.get("schema", {})
            assert media.get("example") or media.get("examples") or schema.get("examples"), f"{name}: request"
        good = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
        assert good, name
        for status, answer in good.items():
            if status == "204" or name.startswith("HEAD"):
                assert "content" not in answer, f"{name}: {status}"
                continue
            assert answer["content"], f"{name}: {status}"
            for media in answer["content"].values():
                assert media.get("schema") or media["itemSchema"], f"{name}: {status}"
                assert "example" in media, f"{name}: {status}"
        for parameter in operation.get("parameters", []):
            shown = "example" in parameter or parameter["schema"].get("examples")
            assert shown or parameter["in"] == "query" or not parameter["required"], f"{name}: {parameter['name']}"


def test_every_example_fits_its_schema(document: dict[str, Any]) -> None:
    def check(name: str, schema: dict[str, Any], value: Any) -> None:
        nonlocal checked
        found = list(validator_for(schema | {"components": document["components"]}).iter_errors(value))
        assert not found, f"{name}: {[each.message for each in found]}"
        checked += 1

    checked = 0
    for name, operation in operations(document).items():
        for parameter in operation.get("parameters", []):
            for value in parameter["schema"].get("examples", []):
                check(f"{name}: {parameter['name']}", parameter["schema"], value)
        for answer in [operation.get("requestBody", {}), *operation["responses"].values()]:
            for kind, media in answer.get("content", {}).items():
                values = [each["value"] for each in media.get("examples", {}).values()]
                for value in [*values, *([media["example"]] if "example" in media else [])]:
                    check(f"{name}: {kind}", media.get("schema", {"type": "string"}), value)
    for name, schema in document["components"]["schemas"].items():
        for value in schema.get("examples", []):
            check(name, schema, value)
    assert checked > 500


def test_every_answer_names_its_headers(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        keyed = any(each["name"] == "Idempotency-Key" for each in operation.get("parameters", []))
        for status, answer in operation["responses"].items():
            named = set(answer["headers"])
            assert "X-Request-ID" in named, name
            assert ("Retry-After" in named) == (status in {"429", "503"}), f"{name}: {status}"
            assert ("WWW-Authenticate" in named) == (status == "401"), f"{name}: {status}"
            assert ("Idempotency-Replayed" in named) == (keyed and status.startswith("2")), f"{name}: {status}"


def test_being_unready_is_an_answer_of_its_own(document: dict[str, Any]) -> None:
    unready = document["paths"]["/ready"]["get"]["responses"]["503"]
    assert set(unready["content"]) == {"application/json", "application/problem+json"}
    assert unready["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Readiness"}


def test_every_operation_names_its_errors_under_the_right_status(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        declared = set()
        for status, answer in operation["responses"].items():
            if int(status) < 400 or "application/problem+json" not in answer["content"]:
                continue
            media = answer["content"]["application/problem+json"]
            assert media["schema"] == {"$ref": "#/components/schemas/Problem"}, name
            for code, example in media["examples"].items():
                assert HTTP_STATUS[ErrorCode(code)] == int(status), f"{name}: {code}"
                assert f"`{code}`" in answer["description"], f"{name}: {code}"
                Problem.model_validate(example["value"])
                declared.add(ErrorCode(code))
        assert declared >= ALWAYS, f"{name}: {ALWAYS - declared}"
        if operation.get("security"):
            assert declared >= {ErrorCode.UNAUTHENTICATED, ErrorCode.DEVICE_REVOKED}, name
        keyed = any(each["name"] == "Idempotency-Key" for each in operation.get("parameters", []))
        assert (ErrorCode.IDEMPOTENCY_KEY_REUSED in declared) == keyed, name
        if "application/json" in operation.get("requestBody", {}).get("content", {}):
            assert declared >= {ErrorCode.MALFORMED_REQUEST, ErrorCode.BODY_TOO_LARGE}, name


def test_operations_are_named_once_and_plainly(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in names)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(reference := value.get("$ref"), str):
                target: Any = document
                for part in reference.removeprefix("#/").split("/"):
                    target = target[part]
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(document)
    assert "HTTPValidationError" not in str(document["paths"])


def test_the_reference_needs_nothing_from_elsewhere(api: RunningApi) -> None:
    page = api.client(None).get("/docs")
    assert page.status_code == 200
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(linked) >= 3
    for address in linked:
        assert address.startswith("/docs/static/"), address
        assert api.client(None).get(address).status_code == 200
    assert "/openapi.json" in page.text
