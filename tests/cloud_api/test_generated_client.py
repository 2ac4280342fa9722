"""A client generated from the document plays a device and an operator through a round."""

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from protocol.assignments import Assignment
from protocol.headers import content_digest
from protocol.runs import Run
from tests.cloud_api.running_api import KEY, PROFILE, RunningApi, delta_for, logits

PACKAGE = "generated_cotune_client"


@pytest.fixture
def generated(fresh_api: RunningApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    document = tmp_path / "openapi.json"
    document.write_text(fresh_api.client(None).get("/openapi.json").text)
    config = tmp_path / "config.yml"
    config.write_text(
        "post_hooks: []\ncontent_type_overrides:\n  application/x-tar: application/octet-stream\n"
        "  text/markdown: text/plain\n"
    )
    program = Path(sys.executable).parent / "openapi-python-client"
    command = [program, "generate", "--path", document, "--config", config, "--meta", "none"]
    command += ["--output-path", tmp_path / PACKAGE, "--fail-on-warning"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [each for each in sys.modules if each.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def operation(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.api.{name}").sync_detailed


def model(name: str) -> Any:
    return getattr(importlib.import_module(f"{PACKAGE}.models"), name)


class Clients:
    """Clients of the generated package; closed together."""

    def __init__(self, url: str) -> None:
        self._package = importlib.import_module(PACKAGE)
        self._options: dict[str, Any] = {"base_url": url, "httpx_args": {"trust_env": False}}
        self._made: list[Any] = []

    def make(self, token: str | None) -> Any:
        kind = "Client" if token is None else "AuthenticatedClient"
        made = getattr(self._package, kind)(**self._options, **({} if token is None else {"token": token}))
        self._made.append(made)
        return made

    def close(self) -> None:
        for each in self._made:
            each.get_httpx_client().close()


@pytest.fixture
def clients(generated: None, fresh_api: RunningApi) -> Iterator[Clients]:
    made = Clients(fresh_api.url)
    yield made
    made.close()


def test_a_generated_client_completes_a_round(fresh_api: RunningApi, clients: Clients) -> None:
    file = importlib.import_module(f"{PACKAGE}.types").File
    operator, anybody = clients.make(KEY), clients.make(None)

    token = operation("enrolment.create_token")(client=operator, body=model("EnrolmentTokenCreate")(uses=1)).parsed
    enrolment = {"token": token.token, "name": "generated", "profile": PROFILE}
    enrolled = operation("enrolment.enrol")(client=anybody, body=model("EnrolmentRequest").from_dict(enrolment))
    assert enrolled.status_code == 201
    device = clients.make(enrolled.parsed.credential)
    request = {
        "name": "generated",
        "strategy": {"name": "co_plms"},
        "rounds": 1,
        "llm": "hub/llm",
        "public_data": "hub/data",
        "grace_seconds": 0,
    }
    created = operation("runs.create_run")(client=operator, body=model("RunCreate").from_dict(request)).parsed
    fresh_api.prepare(Run.model_validate_json(json.dumps(created.to_dict())))

    assignment = operation("assignments.next_assignment")(client=device, wait_seconds=0).parsed
    assert assignment.run_id == created.run_id
    for reference in (assignment.adapter, assignment.probe_set):
        answer = operation("artifacts.download")(client=device, sha256=reference.sha256)
        assert sha256(answer.content).hexdigest() == reference.sha256
    offered = Assignment.model_validate_json(json.dumps(assignment.to_dict()))
    parts = {"adapter_delta": delta_for(offered), "logits": logits()}
    named = []
    for kind, content in parts.items():
        digest = sha256(content).hexdigest()
        uploaded = operation("updates.upload_part")(
            client=device,
            assignment_id=assignment.assignment_id,
            kind=model("PartKind")(kind),
            body=file(payload=io.BytesIO(content)),
            content_digest=content_digest(digest),
        )
        assert uploaded.status_code == 201, uploaded.content
        named.append({"kind": kind, "sha256": digest, "size_bytes": len(content)})
    submission = {"base_sha256": assignment.adapter.sha256, "num_examples": 10, "parts": named, "metrics": {}}
    receipt = operation("updates.submit")(
        client=device, assignment_id=assignment.assignment_id, body=model("Submission").from_dict(submission)
    )
    assert receipt.status_code == 201, receipt.content
    (shown,) = operation("rounds.list_rounds")(client=operator, run_id=created.run_id).parsed.items
    assert shown.status == "aggregating"
    refused = operation("runs.show_run")(client=operator, run_id="run_nobody")
    assert refused.status_code == 404
    assert refused.parsed.code == "run_not_found"
