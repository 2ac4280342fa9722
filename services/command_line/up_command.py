"""`cotune up`: the cloud on this machine, kept alive until Ctrl-C."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from command_line import folders
from command_line.api_client import ApiClient
from command_line.embedded import HOST, cloud_environment, cloud_specs, wait_until_ready
from command_line.errors import BadInput
from command_line.interruption import Interrupted, interruption
from command_line.output import console
from command_line.ports import free_port, require_free
from command_line.supervisor import Supervisor


def up(
    host: Annotated[str, typer.Option(help="Address to listen on. Devices elsewhere need one that they can reach.")] = (
        HOST
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = (
        folders.DEFAULT_PORT
    ),
) -> None:
    """Start the cloud on this machine: API, worker and controller. Ctrl-C ends it; its state stays.

    State lives under $COTUNE_HOME (default ~/.local/share/cotune): a SQLite file, a folder of artifacts, a queue that
    needs no server, the operator key. With COTUNE_DATABASE_URL and COTUNE_BROKER_URL it uses PostgreSQL and Redis.
    """
    out = console()
    home = folders.prepare(folders.home_folder(), what="the home folder", variable="COTUNE_HOME")
    with interruption() as state, _only_one(home):
        port = port or free_port(host)
        require_free(host, port)
        logs = folders.prepare(home / "logs", what="the folder for logs", variable="COTUNE_HOME")
        key = _operator_key(home)
        supervisor = Supervisor(logs, notify=out.print, hurry=lambda: state.impatient)
        address = f"{folders.api_scheme()}://{_reachable(host)}:{port}"
        try:
            with supervisor:
                for spec in cloud_specs(host, port, cloud_environment(home)):
                    supervisor.start(spec)
                with ApiClient(address, key, tls=folders.tls_context()) as client:
                    wait_until_ready(client, supervisor)
                (home / folders.ADDRESS_FILE).write_text(address + "\n", encoding="ascii")
                _introduce(out, address, home, logs)
                supervisor.keep_alive(lambda: state.received is not None)
        except Interrupted:
            out.print("Stopped. The state stays; `cotune up` goes on with it.")


def _introduce(out: Console, address: str, home: Path, logs: Path) -> None:
    facts = {
        "API": address,
        "Documentation": f"{address}/docs",
        "Operator key": _key_place(home),
        "State": str(home),
        "Logs": str(logs),
    }
    for name, value in facts.items():
        out.print(f"[bold]{name + ':':<15}[/bold]{value}", soft_wrap=True)
    out.print("Next: `cotune device token`, then `cotune run create run.toml`. Ctrl-C stops.")


def _operator_key(home: Path) -> str:
    """The key that the user set, or that of the home, made if need be."""
    if not (os.environ.get("COTUNE_OPERATOR_KEY") or os.environ.get("COTUNE_OPERATOR_KEY_FILE")):
        folders.make_operator_key(home)
    return folders.operator_key()


def _key_place(home: Path) -> str:
    if os.environ.get("COTUNE_OPERATOR_KEY"):
        return "as set in COTUNE_OPERATOR_KEY"
    path = os.environ.get("COTUNE_OPERATOR_KEY_FILE") or home / folders.KEY_FILE
    return f"in {path}; commands on this machine find it by themselves"


def _reachable(host: str) -> str:
    """An address at which commands on this machine reach a server that listens on `host`."""
    if host in ("0.0.0.0", ""):
        return HOST
    return f"[{host}]" if ":" in host else host


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Hold the home folder's lock.

    Raises:
        BadInput: another `cotune up` holds it.
    """
    with open(home / "up.lock", "a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BadInput(
                f"`cotune up` already runs for {home} (process {file.read().strip()})",
                next_step="use that one, or set COTUNE_HOME to another folder",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
