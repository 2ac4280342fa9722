"""The devices of a demo: enrolled and run by the same `cotune-agent` that a real device runs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line.api_client import ApiClient
from command_line.embedded import CLIENTS_STAGE
from command_line.errors import ProcessFailed
from command_line.supervisor import ProcessSpec, Supervisor, tail
from protocol.devices import EnrolmentTokenCreate

NAMES = ("phone", "tablet", "laptop", "kiosk", "gateway", "car", "camera", "watch")
AGENT = [sys.executable, "-m", "edge_agent"]


@dataclass(frozen=True)
class DemoDevice:
    """One device: its name, what it holds and where its agent lives."""

    name: str
    domain: str
    model: Path
    train: Path
    test: Path
    home: Path


def device_name(index: int) -> str:
    """Return the name of the demo's device of that index."""
    return NAMES[index] if index < len(NAMES) else f"device-{index + 1}"


def enrol_and_start(
    devices: Sequence[DemoDevice], client: ApiClient, supervisor: Supervisor, environment: dict[str, str]
) -> None:
    """Enrol every device at the same time, each with a token of its own, and start each agent once it is enrolled.

    Raises:
        ProcessFailed: an enrolment failed; holds the end of its log.
    """
    waiting = {}
    for device in devices:
        token = client.create_token(EnrolmentTokenCreate(note=f"demo: {device.name}")).token
        spec = ProcessSpec(
            f"enrol-{device.name}", _enrol_command(device, client.server), environment | {"COTUNE_TOKEN": token}
        )
        waiting[device.name] = (device, supervisor.run(spec))

    def some_left() -> bool:
        for name, (device, process) in list(waiting.items()):
            code = process.poll()
            if code is None:
                continue
            if code != 0:
                log = supervisor.logs / f"enrol-{name}.log"
                raise ProcessFailed(f"{name} could not enrol (exit code {code}); the end of {log}:\n{tail(log)}")
            del waiting[name]
            command = [*AGENT, "start", "--home", str(device.home)]
            supervisor.start(ProcessSpec(name, command, environment, CLIENTS_STAGE))
        return bool(waiting)

    supervisor.keep_alive(lambda: not some_left(), every_seconds=0.1)


def _enrol_command(device: DemoDevice, server: str) -> list[str]:
    # The token travels in the environment: a command line can be read by every user of the machine.
    return [
        *AGENT, "enroll", "--home", str(device.home), "--server", server, "--name", device.name,
        "--model", str(device.model), "--data", str(device.train), "--test", str(device.test),
        "--domain", device.domain,
    ]  # fmt: skip
