"""docs/api.md: its lines run one after another in one shell against the real API, and its paths are the API's."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from persistence import artifacts, results
from persistence.jobs import JobRecord
from protocol.assignments import Assignment
from tests.cloud_api.running_api import KEY, RunningApi, delta_for, logits, safetensors

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
END = "end of the block:"


class Shell:
    """A shell that stays, so that what one block sets the next one has."""

    def __init__(self, folder: Path) -> None:
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "COTUNE_HOME": str(folder), "no_proxy": "*"}
        self._process = subprocess.Popen(
            ["/bin/sh"], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, block: str) -> str:
        """Return what a block printed. Every line of it must end well."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"set -e\n{block}\nset +e\necho\necho '{END}'\n")
        self._process.stdin.flush()
        printed = ""
        for line in self._process.stdout:
            if line.startswith(END):
                return printed
            printed += line
        raise AssertionError(f"it ended with {self._process.wait()} in\n{block}\n{printed}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    missing = [each for each in ("curl", "openssl", "python3", "sha256sum") if shutil.which(each) is None]
    if missing:
        pytest.skip(f"docs/api.md uses {', '.join(missing)}")
    folder = tmp_path / "walk"
    folder.mkdir()
    (folder / "operator.key").write_text(f"{KEY}\n")
    running = Shell(folder)
    yield running
    running.close()


def publish(api: RunningApi, run_id: str, assignment: Assignment) -> None:
    """Do what a worker does once the updates are in."""
    now = datetime.now(UTC)
    adapters = [api.cloud.blobs.put_bytes(safetensors(fill=fill)) for fill in (1, 2)]

    def finish(work: Callable[[JobRecord], None]) -> None:
        work(api._claim(session, run_id, now))

    with api.cloud.database.transaction() as session:
        for blob in adapters:
            artifacts.register(session, blob.sha256, blob.size, "adapter", run_id, now)
        proxy, llm = (blob.sha256 for blob in adapters)
        counted = [assignment.assignment_id]
        finish(lambda job: results.finish_aggregation(session, job, "worker", proxy, counted, {}, now))
        finish(lambda job: results.finish_co_tuning(session, job, "worker", results.Candidate(proxy, llm), {}, now))
        finish(lambda job: results.finish_evaluation(session, job, "worker", {}, True, now))


def test_the_lines_run(fresh_api: RunningApi, shell: Shell, tmp_path: Path) -> None:
    begin, create, enrol, ask, hand_in, versions, repeat, pages, files, stream = BLOCKS
    begin = begin.replace("http://127.0.0.1:8000", fresh_api.url)
    assert '{"items":[],"next_cursor":null}' in shell.run(begin)
    create = create.replace("/models/my-llm", "hub/llm").replace("/data/public.jsonl", "hub/data")
    assert '"status":"pending"' in shell.run(create)
    [run] = fresh_api.operator.get("/v1/runs").json()["items"]
    fresh_api.prepare(type("Prepared", (), {"run_id": run["run_id"]}))  # type: ignore[arg-type]
    shell.run(enrol)
    shell.run(ask)
    assignment = Assignment.model_validate_json((tmp_path / "walk" / "assignment.json").read_bytes())
    (tmp_path / "walk" / "delta.safetensors").write_bytes(delta_for(assignment))
    (tmp_path / "walk" / "logits.safetensors").write_bytes(logits())
    assert '"status":"submitted"' in shell.run(hand_in)
    publish(fresh_api, run["run_id"], assignment)
    assert "# first-run, version 1" in shell.run(versions)
    printed = shell.run(repeat)
    assert "idempotency-replayed: true" in printed
    assert len(set(re.findall(r'"token":"([^"]+)"', printed))) == 1
    assert len(json.loads(shell.run(pages))["items"]) == 2
    assert re.findall(r"HTTP/1.1 (\d+)", shell.run(files)) == ["304", "206"]
    fresh_api.operator.post(f"/v1/runs/{run['run_id']}/stop")
    assert "event: run.created" in shell.run(stream)


def test_the_paths_are_those_of_the_api(fresh_api: RunningApi) -> None:
    document = fresh_api.client(None).get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    known = [re.sub(r"\{[^}]*\}", "[^/]+", path) for path in document["paths"]]
    named = {re.sub(r"\$\w+", "x", path) for path in re.findall(r"\$SERVER(/[\w/$.-]+)", PAGE)}
    assert len(named) > 10
    for path in named:
        assert any(re.fullmatch(pattern, path) for pattern in known), path
