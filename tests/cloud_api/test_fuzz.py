"""Schemathesis over the whole API, as an operator and as a device: every check on every operation of the document."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest

from cloud_api.security import Rates
from tests.cloud_api.running_api import KEY as OPERATOR
from tests.cloud_api.running_api import PLENTY, DeviceClient, RunningApi, delta_for, running_api, settings_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
CASES = int(os.environ.get("COTUNE_FUZZ_CASES", "60"))
OF_DEVICES = "^/v1/(assignments|devices/me)"


@pytest.fixture
def busy_api(home: Path) -> Iterator[RunningApi]:
    """An API that limits nobody: who is refused for haste tests nothing."""
    rates = Rates(**dict.fromkeys(asdict(Rates()), PLENTY))
    with running_api(settings_in(home, rates=rates)) as running:
        yield running


def existing(api: RunningApi, device: DeviceClient) -> dict[str, list[str | int]]:
    """Values of path parameters that lead to something; made up ones alone would only ever be not found."""
    run, other = api.running_run(device), api.create_run(device_ids=[api.enrol("other").device_id])
    assignment = device.poll()
    assert assignment is not None
    assert assignment.adapter is not None
    delta = delta_for(assignment)
    upload = device.begin(assignment, "adapter_delta", delta).json()
    token = api.operator.post("/v1/enrolment-tokens", json={"uses": 1}).json()
    key = api.operator.post("/v1/operators/keys", json={"name": "other", "role": "viewer"}).json()
    webhook = api.operator.post("/v1/webhooks", json={"url": "https://webhooks.example.org/cotune"}).json()
    return {
        "run_id": [run.run_id, other.run_id],
        "number": [0, 1],
        "device_id": [device.device_id],
        "assignment_id": [assignment.assignment_id],
        "upload_id": [upload["upload_id"]],
        "sha256": [assignment.adapter.sha256, sha256(delta).hexdigest()],
        "token_id": [token["token_id"]],
        "key_id": [key["key_id"]],
        "webhook_id": [webhook["webhook_id"]],
        "federation": ["default"],
    }


def configuration(folder: Path, known: dict[str, list[str | int]]) -> Path:
    """Write schemathesis.toml with values that lead to something, taken for half of the requests."""
    lines = [(ROOT / "schemathesis.toml").read_text()]
    for name, values in known.items():
        lines += [f"[dictionaries.{name}]", f"values = {json.dumps(values)}"]
    lines += ["[parameters]"]
    lines += [f'"path.{name}" = {{ dictionary = "{name}", probability = 0.5 }}' for name in known]
    path = folder / "schemathesis.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def fuzz(api: RunningApi, credential: str, device: DeviceClient, *arguments: str) -> str:
    home = api.cloud.settings.home
    command = [
        *(str(Path(sys.executable).parent / "schemathesis"), "--config-file"),
        *(str(configuration(home, existing(api, device))), "run"),
        *("--checks", "all", "--max-examples", str(CASES), "--phases", "examples,coverage,fuzzing,stateful"),
        *("--continue-on-failure", "--seed", "1", "--header", f"Authorization: Bearer {credential}"),
        *("--report-dir", str(home / "report"), *arguments, f"{api.url}/openapi.json"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3500, check=False, cwd=home)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    return ended.stdout


def test_operators_operations(busy_api: RunningApi) -> None:
    assert "passed" in fuzz(busy_api, OPERATOR, busy_api.enrol(), "--exclude-path-regex", OF_DEVICES)


def test_devices_operations(busy_api: RunningApi) -> None:
    device = busy_api.enrol()
    assert "passed" in fuzz(busy_api, device.credential, device, "--include-path-regex", OF_DEVICES)
