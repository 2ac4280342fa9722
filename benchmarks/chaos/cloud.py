"""The service as processes of its own, kept alive: whatever is killed is started again at once."""

import contextlib
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx

from benchmarks.chaos import device as device_program
from benchmarks.chaos.servers import HOST, PostgresqlServer, RedisServer, free_port
from benchmarks.chaos.zygote import CHUNK_BYTES, CLOCK_SKEW, Zygote
from edge_agent.signing import DeviceAuthentication, make_key, public_text
from persistence.blobs import FolderBlobStore
from persistence.database import Database
from protocol.errors import DomainError
from protocol.federations import DEFAULT_FEDERATION
from protocol.queue import embedded_broker_url

KEY = secrets.token_hex(32)
API, WORKER, CONTROLLER = "api", "worker", "controller"
DATABASE, BROKER = "database", "broker"
SERVICES = (API, WORKER, CONTROLLER)
SMALL_CHUNK_BYTES = 1024
"""So that the chaos's files of a few thousand bytes go in several chunks, and their headers too."""

LOOK_SECONDS = 0.02
WAIT_SECONDS = 90.0
# A killed worker is noticed after seconds and not after half a minute.
IMPATIENT = {"COTUNE_LEASE_SECONDS": "2", "COTUNE_RESEND_AFTER_SECONDS": "1", "COTUNE_SWEEP_SECONDS": "0.5"}
_CALLS = {API: "cloud_api.__main__:main", WORKER: "worker.__main__:main", CONTROLLER: "worker.__main__:main"}
Answer = TypeVar("Answer")


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass
class _Kept:
    """A process that is started again whenever it ends."""

    zygote: Zygote
    call: str
    arguments: list[str]
    environment: dict[str, str]
    pid: int = 0
    starts: int = 0


@dataclass
class Cloud:
    """API, worker, controller, and the database and broker that they use. Use as a context manager.

    Args:
        folder: for state and logs.
        light: forks what needs no torch.
        heavy: forks workers.
        served: on PostgreSQL and Redis of our own; else on SQLite and the broker that is a folder.
        home: where the service keeps everything; default: in `folder`.
        clocks: seconds by which each service's clock is ahead.
    """

    folder: Path
    light: Zygote
    heavy: Zygote
    served: bool
    home: Path | None = None
    clocks: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> "Cloud":
        self.folder.mkdir(mode=0o711)
        self.state = self.home or self.folder / "home"
        self.state.mkdir(exist_ok=True)
        self.port = free_port()
        self.postgresql = PostgresqlServer(self.folder / "postgresql") if self.served else None
        self.redis = RedisServer(self.folder / "redis") if self.served else None
        for server in self._servers():
            server.create()
        self.database_url = self.postgresql.url if self.postgresql else f"sqlite:///{self.state / 'cotune.sqlite3'}"
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._kept: dict[str, _Kept] = {}
        self._keeper = threading.Thread(target=self._keep_alive, name="keeper", daemon=True)
        for name, arguments in ((API, ["--host", HOST, "--port", str(self.port)]), (CONTROLLER, ["--controller"])):
            self.keep(name, self.light, _CALLS[name], arguments, self._environment(name))
        for name in (WORKER, "worker-2"):
            self.keep(name, self.heavy, _CALLS[WORKER], [], self._environment(WORKER))
        self._keeper.start()
        self.operator = self.client()
        self.wait("the API", self._ready)
        self.database = Database(self.database_url)
        self.blobs = FolderBlobStore(self.state / "blobs")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._keeper.join()
        self.operator.close()
        if hasattr(self, "database"):
            self.database.dispose()
        for kept in self._kept.values():
            self._end(kept)
        for server in self._servers():
            server.stop()

    def keep(self, name: str, zygote: Zygote, call: str, arguments: list[str], environment: dict[str, str]) -> None:
        """Start a process and keep it alive."""
        with self._lock:
            self._kept[name] = _Kept(zygote, call, arguments, environment)
            self._start(name)

    def forget(self, name: str) -> None:
        """End a process that was kept alive."""
        with self._lock:
            self._end(self._kept.pop(name))

    def add_device(
        self, number: int, address: str, logits: Path, gates: Path, federations: Sequence[str], *, chunked: bool
    ) -> str:
        """Enrol a device and keep its agent alive; return its id.

        Args:
            chunked: whether it sends even small files in chunks.
        """
        home = self.folder / f"device-{number}"
        device_id, credential = self.enrol(f"device-{number}", home, federations)
        self.keep(
            f"device-{number}",
            self.light,
            f"{device_program.__name__}:main",
            [str(home), address, credential, str(number), str(logits), str(gates), *(["0"] if chunked else [])],
            os.environ | {CLOCK_SKEW: str(self.clocks.get("device", 0.0))},
        )
        return device_id

    def enrol(
        self, name: str, home: Path | None = None, federations: Sequence[str] = (DEFAULT_FEDERATION,)
    ) -> tuple[str, str]:
        """Enrol a device, with a signing key in its home folder; return its id and its credential."""
        wanted = {"uses": 1, "federations": list(federations)}
        token = self.ask("POST", "/v1/enrolment-tokens", json=wanted)["token"]
        key = make_key(self.home_of(name, home))
        profile = device_program.PROFILE.model_dump(mode="json")
        body = {"token": token, "name": name, "profile": profile, "public_key": public_text(key)}
        receipt = self.ask("POST", "/v1/devices", json=body)
        return str(receipt["device_id"]), str(receipt["credential"])

    def device_client(self, name: str, credential: str) -> httpx.Client:
        """A client of the API that signs as the device that was enrolled under this name."""
        return self.client(DeviceAuthentication(credential, make_key(self.home_of(name)), _now))

    def home_of(self, name: str, home: Path | None = None) -> Path:
        """Return the folder of a device's signing key, which is there then."""
        home = home or self.folder / name.replace(" ", "-")
        home.mkdir(parents=True, exist_ok=True)
        return home

    def client(self, auth: httpx.Auth | None = None) -> httpx.Client:
        """A client of the API, without the proxy in between; without `auth` the operator's."""
        headers = {} if auth else {"Authorization": f"Bearer {KEY}"}
        url = f"http://{HOST}:{self.port}"
        return httpx.Client(base_url=url, headers=headers, auth=auth, timeout=40, trust_env=False)

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """Ask as the operator until there is an answer; a POST carries one idempotency key for all its tries."""
        if method == "POST":
            options["headers"] = {"Idempotency-Key": os.urandom(12).hex()}

        def once() -> httpx.Response | None:
            with contextlib.suppress(httpx.TransportError):
                response = self.operator.request(method, path, **options)
                return response if response.status_code != 503 else None
            return None

        response = self.wait(f"{method} {path}", once)
        if not response.is_success:
            raise RuntimeError(f"{method} {path}: {response.status_code} {response.text[:400]}")
        return response.json() if response.content else None

    def read(self, look: Callable[..., Answer], *arguments: Any, **named: Any) -> Answer:
        """Read from the database, waiting for it where it is away."""

        def once() -> tuple[Answer] | None:
            with contextlib.suppress(DomainError), self.database.reading() as session:
                return (look(session, *arguments, **named),)
            return None

        return self.wait("the database", once)[0]

    def wait(self, what: str, look: Callable[[], Answer | None], seconds: float = WAIT_SECONDS) -> Answer:
        """Look until there is something."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (answer := look()) is not None:
                return answer
            time.sleep(LOOK_SECONDS)
        raise TimeoutError(f"{what}: nothing within {seconds:.0f} s; logs: {self.folder}")

    def alive(self, name: str) -> bool:
        """Return whether something lives: a service, a device, the database or the broker."""
        if name == DATABASE:
            return self.postgresql is not None and self.postgresql.alive()
        if name == BROKER:
            return self.redis is not None and self.redis.alive()
        with self._lock:
            kept = self._kept.get(name)
            return kept is not None and kept.zygote.status(kept.pid) is None

    def kill(self, name: str) -> bool:
        """kill -9; False if it was dead already."""
        with self._lock:
            if not self.alive(name):
                return False
            if name == DATABASE and self.postgresql is not None:
                self.postgresql.kill()
            elif name == BROKER and self.redis is not None:
                self.redis.kill()
            else:
                try:
                    os.kill(self._kept[name].pid, signal.SIGKILL)
                except ProcessLookupError:  # it ended since it was looked at
                    return False
        return True

    def kill_process(self, pid: int) -> None:
        """kill -9 of one start of a process, if that is still the living one."""
        with self._lock:
            for name, kept in self._kept.items():
                if kept.pid == pid:
                    self.kill(name)

    def process_id(self, name: str) -> int:
        """The process id of a service now."""
        with self._lock:
            return self._kept[name].pid

    def starts(self, name: str) -> int:
        """How often a process was started."""
        return self._kept[name].starts

    def _servers(self) -> list[PostgresqlServer | RedisServer]:
        return [server for server in (self.postgresql, self.redis) if server is not None]

    def _environment(self, name: str) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("COTUNE_")}
        environment |= IMPATIENT | {
            "COTUNE_HOME": str(self.state),
            "COTUNE_OPERATOR_KEY": KEY,
            "COTUNE_DATABASE_URL": self.database_url,
            "COTUNE_BROKER_URL": self.redis.url if self.redis else embedded_broker_url(self.state),
            "COTUNE_TORCH_THREADS": "1",
            "COTUNE_REQUIRE_SIGNATURES": "on",
            CHUNK_BYTES: str(SMALL_CHUNK_BYTES),
            "COTUNE_RATE_ENROLMENT": "1000/10000",
            "COTUNE_RATE_DEVICE": "1000/10000",
            "COTUNE_RATE_FAILURE": "1000/10000",  # spoilt signatures come by the hundred
            "TOKENIZERS_PARALLELISM": "false",
            CLOCK_SKEW: str(self.clocks.get(name, 0.0)),
        }
        if migrations := os.environ.get("COTUNE_MIGRATIONS"):
            environment["COTUNE_MIGRATIONS"] = migrations
        return environment

    def _ready(self) -> bool | None:
        with contextlib.suppress(httpx.TransportError):
            return self.operator.get("/ready").status_code == 200 or None
        return None

    def _start(self, name: str) -> None:
        kept = self._kept[name]
        log = self.folder / f"{name}.log"
        kept.pid = kept.zygote.start(kept.call, kept.arguments, kept.environment, log)
        kept.starts += 1

    def _end(self, kept: _Kept) -> None:
        if kept.zygote.status(kept.pid) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(kept.pid, signal.SIGKILL)
            kept.zygote.wait(kept.pid, 10)

    def _keep_alive(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            with self._lock:
                for name, kept in self._kept.items():
                    if kept.zygote.status(kept.pid) is not None:
                        self._start(name)
                for server in self._servers():
                    if not server.alive():
                        server.start()
        for server in self._servers():  # they end with the thread that started them
            server.stop()
