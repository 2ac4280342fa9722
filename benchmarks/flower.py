"""Rounds of Flower's deployment mode: a SuperLink and SuperNodes as Flower's guide starts them, and an app that echoes.

Flower wants older versions of typer, rich, uvicorn, fastapi and others than the service is tested with, so it lives in
a virtual environment of its own, which `make bench-service` makes; without it the comparison is left out. Its state is
in memory, as it is by default, and its connections are unencrypted and unsigned, as ours here.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from command_line.embedded import CLIENTS_STAGE, HOST, SERVER_STAGE, without_our_settings
from command_line.supervisor import ProcessSpec, Supervisor, tail

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / ".venv-flower" / "bin"
APP = Path(__file__).parent / "flower_app"
SUPERLINK = "superlink"
START_SECONDS = 300.0
ROUND_SECONDS = 600.0
LOOK_SECONDS = 0.05
_ACTIVATED = "Activated node_id="


@dataclass(frozen=True)
class FlowerRound:
    """One round: when it began and ended (`time.time`), and how many clients answered."""

    started: float
    ended: float
    answers: int

    @property
    def seconds(self) -> float:
        """From the choice of the clients to the mean of their answers."""
        return self.ended - self.started


class Flower:
    """A running federation whose ServerApp waits for its turn."""

    def __init__(self, supervisor: Supervisor, turns: Path) -> None:
        self._supervisor = supervisor
        self._turns = turns
        self._played = 0

    def superlink_id(self) -> int:
        """The SuperLink's process; the ServerApp's and others descend from it."""
        return self._supervisor.process_ids()[SUPERLINK]

    def play(self) -> FlowerRound:
        """Let the next round go, and wait for its end.

        Raises:
            TimeoutError: it does not end.
        """
        self._played += 1
        (self._turns / f"go-{self._played}").touch()
        done = self._turns / f"done-{self._played}"
        self.wait(done.exists, ROUND_SECONDS, f"Flower's round {self._played}")
        return FlowerRound(**json.loads(done.read_text()))

    def wait(self, until: Callable[[], bool], seconds: float, what: str) -> None:
        """Look until it is so."""
        deadline = time.monotonic() + seconds
        while not until():
            self._supervisor.check()
            if time.monotonic() > deadline:
                end = tail(self._supervisor.logs / f"{SUPERLINK}.log")
                raise TimeoutError(f"{what}: not within {seconds:.0f} s; the end of the SuperLink's log:\n{end}")
            time.sleep(LOOK_SECONDS)


def installed() -> bool:
    """Return whether Flower is there to be compared with."""
    return (PROGRAMS / "flower-superlink").exists()


@contextmanager
def running_flower(folder: Path, devices: int, rounds: int, **arrays: int) -> Iterator[Flower]:
    """Start a federation in `folder`, and an app of so many rounds in it that waits for the first one's turn.

    Args:
        folder: for its configuration, logs and what it installs.
        devices: SuperNodes.
        rounds: that `play` may be called for.
        arrays: `tensors`, `rows`, `columns` of the model.
    """
    turns, logs, home = folder / "turns", folder / "logs", folder / "home"
    for each in (turns, logs, home):
        each.mkdir(parents=True)
    port, *node_ports = free_ports(1 + devices)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "{HOST}:{port}"\ninsecure = true\n'
    )
    environment = without_our_settings() | {
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("PYTHONPATH", None)
    server = [str(PROGRAMS / "flower-superlink"), "--insecure", "--disable-runtime-dependency-installation"]
    with Supervisor(logs, notify=print, environment=environment) as supervisor:
        supervisor.start(ProcessSpec(SUPERLINK, [*server, "--port", str(port)], stop_stage=SERVER_STAGE))
        for number, own_port in enumerate(node_ports):
            command = _node_command(number, port, own_port)
            supervisor.start(ProcessSpec(f"node-{number}", command, stop_stage=CLIENTS_STAGE))
        flower = Flower(supervisor, turns)
        log = logs / f"{SUPERLINK}.log"
        flower.wait(lambda: log.read_text().count(_ACTIVATED) >= devices, START_SECONDS, "the SuperNodes' start")
        config = {"rounds": rounds, "devices": devices, **arrays}
        said = " ".join([f'turns="{turns}"', *(f"{name}={value}" for name, value in config.items())])
        command = [str(PROGRAMS / "flwr"), "run", str(APP), "bench", "--run-config", said]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        flower.wait((turns / "ready-1").exists, START_SECONDS, "the ServerApp's start")
        yield flower


def free_ports(count: int) -> list[int]:
    """Return different ports that nobody listens on now."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _node_command(number: int, superlink_port: int, own_port: int) -> list[str]:
    return [
        *(str(PROGRAMS / "flower-supernode"), "--insecure", "--superlink", f"{HOST}:{superlink_port}"),
        *("--port", str(own_port), "--node-config", f"number={number}"),
    ]
