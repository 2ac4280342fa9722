"""A small life of a cloud and a device with logs at their loudest: no secret is where others could read it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.cloud_api.running_api import PROFILE
from tests.cloud_api.test_process import Process, started
from tests.edge_agent.test_profile import write_weights


@dataclass
class Life:
    """What was made, and everything that others may see of it."""

    process: Process
    device_home: Path
    secrets: dict[str, str] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)

    def keep(self, name: str, secret: str) -> str:
        self.secrets[name] = secret
        return secret

    def ask(
        self, what: str, method: str, path: str, credential: str | None = None, **arguments: object
    ) -> httpx.Response:
        """Send a request whose answer shows no secret."""
        headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        with httpx.Client(base_url=self.process.url, headers=headers, trust_env=False) as http:
            answer = http.request(method, path, **arguments)  # type: ignore[arg-type]
        self.seen[f"{what}: {method} {path}"] = answer.text + str(answer.headers)
        return answer

    def agent(self, *arguments: str, **changed: str) -> None:
        environment = os.environ | {"COTUNE_LOG_LEVEL": "debug", "COTUNE_LOG_FORMAT": "json"} | changed
        command = [sys.executable, "-m", "edge_agent", *arguments, "--home", str(self.device_home)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        self.seen[f"agent {arguments[0]}"] = done.stdout + done.stderr
        assert done.returncode == 0, done.stderr


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    log = tmp_path / "api.log"
    with started(tmp_path / "home", log, COTUNE_LOG_LEVEL="debug", COTUNE_LOG_FORMAT="json") as process:
        life = Life(process, tmp_path / "device")
        yield life


def enrol_agent(life: Life, folder: Path, token: str) -> None:
    model, data = folder / "tiny", folder / "train.jsonl"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')
    write_weights(model / "model.safetensors", {"x": [2, 2]})
    data.write_text('{"instruction": "add", "input": "1", "output": "2"}\n')
    arguments = {"server": life.process.url, "name": "tablet", "model": str(model), "data": str(data)}
    life.agent(
        "enroll", *(part for name, value in arguments.items() for part in (f"--{name}", value)), COTUNE_TOKEN=token
    )


def test_no_secret_is_in_logs_events_errors_lists_or_the_database(life: Life, tmp_path: Path) -> None:
    home = life.process.home
    bootstrap = life.keep("bootstrap key", (home / "operator.key").read_text().strip())
    with life.process.operator() as operator:
        admin = life.keep(
            "operator's key", operator.post("/v1/operators/keys", json={"name": "a", "role": "admin"}).json()["key"]
        )
        token = life.keep("token", operator.post("/v1/enrolment-tokens", json={"uses": 1}).json()["token"])
        other = life.keep("other token", operator.post("/v1/enrolment-tokens", json={"uses": 9}).json()["token"])
    enrol_agent(life, tmp_path, token)
    first = life.keep("first credential", (life.device_home / "credential").read_text().strip())
    life.keep("signing key", (life.device_home / "signing.key").read_text().strip())
    life.agent("rotate-credential")
    second = life.keep("second credential", (life.device_home / "credential").read_text().strip())
    assert first != second
    life.agent("status")

    body = {"token": other, "name": "curl", "profile": PROFILE}
    with httpx.Client(base_url=life.process.url, trust_env=False) as http:
        unsigned = life.keep("third credential", http.post("/v1/devices", json=body).json()["credential"])
    life.ask("void", "GET", "/v1/devices/me", first)
    life.ask("unsigned", "GET", "/v1/devices/me", second)
    life.ask("wrong kind", "GET", "/v1/runs", unsigned)
    life.ask("wrong kind", "GET", "/v1/devices/me", admin)
    life.ask("nearly", "GET", "/v1/runs", bootstrap + "x")
    life.ask("wrong field", "POST", "/v1/devices", json=body | {"name": "/", "credential": first})
    life.ask("used", "POST", "/v1/devices", json=body | {"token": token})
    life.ask(
        "no JSON", "POST", "/v1/devices", content=json.dumps(body)[:-1], headers={"Content-Type": "application/json"}
    )
    run = {"name": "run", "strategy": {"name": "standalone"}, "rounds": 1}
    run_id = life.ask("run", "POST", "/v1/runs", admin, json=run).json()["run_id"]
    for path in (f"/v1/runs/{run_id}/events", "/v1/devices", "/v1/enrolment-tokens", "/v1/operators/keys", "/v1/audit"):
        assert life.ask("list", "GET", path, admin).status_code == 200

    life.seen["the API's log"] = (tmp_path / "api.log").read_text()
    life.seen["the ledger"] = (life.device_home / "ledger.jsonl").read_text()
    for file in home.glob("cotune.sqlite3*"):
        life.seen[file.name] = file.read_bytes().decode("latin-1")
    assert '"level": "debug"' in life.seen["the API's log"]
    assert len(life.secrets) == 8
    # Of a credential the part after the id is the secret.
    found = [
        f"{name} in {place}"
        for name, secret in life.secrets.items()
        for place, text in life.seen.items()
        if (secret.partition(".")[2] or secret).rstrip("=") in text
    ]
    assert found == []
