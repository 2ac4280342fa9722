"""The cloud on this machine: the API, a worker and the controller as processes, with their state in one folder."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from command_line.api_client import ApiClient
from command_line.errors import CommandError, TimedOut, Unreachable
from command_line.supervisor import ProcessSpec, Supervisor
from protocol.exit_codes import ServiceExit

Answer = TypeVar("Answer")

HOST = "127.0.0.1"
READY_SECONDS = 90.0
POLL_SECONDS = 0.1
API, WORKER, CONTROLLER = "api", "worker", "controller"

CLIENTS_STAGE, SERVER_STAGE = 0, 1
"""What talks to the API ends first, so that it can say good-bye."""


def cloud_specs(host: str, port: int, environment: Mapping[str, str]) -> list[ProcessSpec]:
    """Return the three processes of the cloud.

    Args:
        environment: At least `COTUNE_HOME`; see `cloud_environment`.
    """
    commands = {
        API: ["cloud_api", "--host", host, "--port", str(port)],
        WORKER: ["worker"],
        CONTROLLER: ["worker", "--controller"],
    }
    return [
        ProcessSpec(
            name,
            [sys.executable, "-m", *command],
            environment,
            stop_stage=SERVER_STAGE if name == API else CLIENTS_STAGE,
            hopeless_exit_code=ServiceExit.SETTINGS,
        )
        for name, command in commands.items()
    ]


def cloud_environment(home: Path, *, torch_threads: int | None = None) -> dict[str, str]:
    """Return the settings that make the services keep their state, and look for the operator key, under `home`."""
    environment = {
        "COTUNE_HOME": str(home),
        "PYTHONUNBUFFERED": "1",
        # Several processes train on the same cores: tokenizers' own threads would only get in each other's way.
        "TOKENIZERS_PARALLELISM": "false",
    }
    if torch_threads is not None:
        environment["COTUNE_TORCH_THREADS"] = str(torch_threads)
    return environment


def wait_until_ready(client: ApiClient, supervisor: Supervisor, *, seconds: float = READY_SECONDS) -> None:
    """Wait until the API and what it needs are up.

    Raises:
        TimedOut: they are not, `seconds` later; says what was still missing.
        ProcessFailed: one of the processes does not stay alive.
    """
    deadline = time.monotonic() + seconds
    missing = "no answer"
    while time.monotonic() < deadline:
        supervisor.check()
        try:
            readiness = client.ready()
        except CommandError as error:
            missing = error.message
        else:
            if readiness.status == "ready":
                return
            missing = ", ".join(f"{name}: {state}" for name, state in readiness.checks.items() if state != "ok")
        time.sleep(POLL_SECONDS)
    raise TimedOut(f"the API at {client.server} is not ready after {seconds:.0f} s: {missing}; logs: {supervisor.logs}")


@dataclass(frozen=True)
class Patience:
    """Asks the API again for a while when it does not answer: the supervisor may be starting it again."""

    supervisor: Supervisor
    seconds: float = 60.0

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """Return the answer of `question`, which is asked again after each `Unreachable` until the time is over."""
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            try:
                return question()
            except Unreachable:
                self.supervisor.check()
                time.sleep(POLL_SECONDS)
        return question()


def without_our_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment without the settings of a service of the user's own, which the demo must not touch."""
    kept = {"COTUNE_MIGRATIONS", "COTUNE_LOG_FORMAT"}
    return {key: value for key, value in environment.items() if not key.startswith("COTUNE_") or key in kept}
