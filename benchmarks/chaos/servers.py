"""A PostgreSQL and a Redis server of our own, on free ports and in a temporary folder, to be killed."""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import redis

from benchmarks.chaos.zygote import die_with_parent

HOST = "127.0.0.1"
USER = "cotune"
READY_SECONDS = 60.0
STOP_SECONDS = 10.0
_DEBIAN = Path("/usr/lib/postgresql")


class Missing(Exception):
    """A program that the machine does not have."""


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def postgresql_programs() -> Path:
    """Return the folder of the newest PostgreSQL's server programs. Raises Missing."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    folders = sorted(_DEBIAN.glob("*/bin"), key=lambda path: [int(number) for number in re.findall(r"\d+", str(path))])
    if not folders:
        raise Missing("PostgreSQL's server programs (initdb, postgres) are neither in PATH nor in /usr/lib/postgresql")
    return folders[-1]


def _launch(command: Sequence[str | Path], folder: Path, log: Path, **as_user: Any) -> "subprocess.Popen[bytes]":
    """Start a server in `folder` that writes to `log` and dies with this process."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, no Python lock
            **as_user,
        )


@dataclass
class PostgresqlServer:
    """One server, as the user that it may run as: it refuses root."""

    folder: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For `COTUNE_DATABASE_URL`."""
        return f"postgresql://{USER}@{HOST}:{self.port}/cotune"

    def create(self) -> None:
        """Make its files, start it, and make an empty database."""
        self._programs = postgresql_programs()
        self._as_user: dict[str, Any] = {}
        self.folder.mkdir()
        if os.geteuid() == 0:
            user = next(each for name in ("postgres", "nobody") for each in pwd.getpwall() if each.pw_name == name)
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        initdb: list[str | Path] = [
            self._programs / "initdb",
            "-D",
            self.folder / "data",
            "-U",
            USER,
            "-A",
            "trust",
            "-E",
            "UTF8",
        ]
        subprocess.run(
            [*initdb, "--locale=C", "--no-sync"], check=True, capture_output=True, cwd=self.folder, **self._as_user
        )
        self.start()
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                with psycopg.connect(host=HOST, port=self.port, user=USER, dbname="postgres", autocommit=True) as there:
                    there.execute("CREATE DATABASE cotune")
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def start(self) -> None:
        """Start it; it answers a moment later."""
        command = [
            *(self._programs / "postgres", "-D", self.folder / "data", "-p", str(self.port), "-h", HOST),
            *("-k", self.folder, "-c", "max_connections=60"),
        ]
        self._process = _launch(command, self.folder, self.folder.parent / "postgresql.log", **self._as_user)

    def alive(self) -> bool:
        """Return whether its first process lives."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """kill -9 of the first process and of every one that serves a connection."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        for pid in (self._process.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def kill_one_backend(self) -> None:
        """kill -9 of one process that serves a connection: the server ends all others and recovers by itself."""
        with psycopg.connect(host=HOST, port=self.port, user=USER, dbname="cotune", connect_timeout=3) as there:
            found = there.execute(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                " ORDER BY state_change DESC NULLS LAST LIMIT 1"
            ).fetchone()
        if found is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[0], signal.SIGKILL)

    def stop(self) -> None:
        """End it at once, cleanly if it can."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()


@dataclass
class RedisServer:
    """One server that keeps nothing on disk: when it is killed, every message is lost."""

    folder: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For `COTUNE_BROKER_URL`."""
        return f"redis://{HOST}:{self.port}/0"

    def create(self) -> None:
        """Start it."""
        program = shutil.which("redis-server")
        if program is None:
            raise Missing("redis-server is not in PATH")
        self._program = program
        self.folder.mkdir()
        self.start()

    def start(self) -> None:
        """Start it; it answers a moment later."""
        command = [self._program, "--port", str(self.port), "--bind", HOST, "--save", "", "--appendonly", "no"]
        self._process = _launch(command, self.folder, self.folder / "redis.log")

    def alive(self) -> bool:
        """Return whether it lives."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def flush(self) -> None:
        """Forget every message, waiting or delivered."""
        with contextlib.closing(redis.Redis(host=HOST, port=self.port, socket_timeout=3)) as client:
            client.flushall()

    def stop(self) -> None:
        """End it."""
        if self.alive():
            self.kill()
