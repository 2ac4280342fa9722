"""Schemathesis over the whole API, as an operator and as a device: every check on every operation of the document."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cloud_api.running_api import KEY, RunningApi

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
CASES = int(os.environ.get("COTUNE_FUZZ_CASES", "60"))
WAITING = "/(events/stream|devices/me/assignment)$"
"""Not asked for: they wait, the one for the end of a run, the other for work."""

OF_DEVICES = "^/v1/(assignments|devices/me)"


def fuzz(api: RunningApi, credential: str, *arguments: str) -> str:
    command = [
        *(str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(ROOT / "schemathesis.toml"), "run"),
        *("--checks", "all", "--max-examples", str(CASES), "--phases", "examples,coverage,fuzzing,stateful"),
        *("--continue-on-failure", "--seed", "1", "--header", f"Authorization: Bearer {credential}"),
        *("--exclude-path-regex", WAITING, "--report-dir", str(api.cloud.settings.home / "report"), *arguments),
        f"{api.url}/openapi.json",
    ]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=1400, check=False, cwd=api.cloud.settings.home
    )
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    return ended.stdout


def test_operators_operations(fresh_api: RunningApi) -> None:
    assert "passed" in fuzz(fresh_api, KEY, "--exclude-path-regex", OF_DEVICES)


def test_devices_operations(fresh_api: RunningApi) -> None:
    device = fresh_api.enrol()
    fresh_api.running_run(device)
    assert device.poll() is not None
    assert "passed" in fuzz(fresh_api, device.credential, "--include-path-regex", OF_DEVICES)
