"""The API's settings, read once from the environment at the entry and passed down."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import tracing
from cloud_api import security
from cloud_api.security import Rates, Tls
from persistence.addresses import database_address
from persistence.blobs import S3Address, read_address
from protocol.queue import embedded_broker_url, queue_folder, queue_name
from protocol.statuses import TRAINING_QUEUE, PartKind

LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
Choice = TypeVar("Choice", bound=str)

KEY_FILE = "operator.key"
DEFAULT_UPLOAD_BYTES = 512 * 2**20
MOST_PROCESSES = 64
SMALLEST_CHUNK = 4 * 2**20
LARGEST_CHUNK = 2 * SMALLEST_CHUNK
"""Bytes. Smaller ones would cost more requests, larger ones more to send again after a cut."""


@dataclass(frozen=True)
class Settings:
    """Where everything is, and what the API allows."""

    home: Path
    """Embedded state: the default place of the database, the queue, the blobs and the operator key."""
    database_url: str = field(repr=False)
    """May hold a password."""
    broker_url: str
    queue_prefix: str
    blobs: Path | S3Address
    operator_key: str = field(repr=False)
    processes: int = 1
    """How many processes serve; each uses one core."""
    traced: bool = False
    """Whether the standard OTEL_* variables ask for traces."""
    log_format: LogFormat = "console"
    log_level: LogLevel = "info"
    upload_limits: Mapping[PartKind, int] = field(default_factory=lambda: dict.fromkeys(PartKind, DEFAULT_UPLOAD_BYTES))
    """Largest size of each part of an update, bytes."""
    heartbeat_seconds: int = 30
    """How often a device is asked to be heard from."""
    feed_seconds: float = 0.25
    """How often the event table is looked at for what other processes committed."""
    probe_seconds: float = 1.0
    """So long `/metrics` and `/ready` give the same counts and checks, however often they are asked."""
    trusted_seconds: float = 300.0
    """How long a device that polls is known without a look at the database, for the answer that there is nothing.

    Revocation is heard of at once; only a credential that its device has replaced is known for so long, in other
    processes. It must be much longer than a long poll: else each poll is looked up, which for 10,000 devices in polls
    of 30 s are 333 look-ups a second. With 30 s, `make bench-waiting` was not through in its time on slow cores.
    """
    stream_heartbeat_seconds: float = 15.0
    """Silence on an event stream after which a comment is sent, so that proxies keep it open."""
    upload_idle_seconds: float = 60.0
    """A request of which nothing comes for so long is given up."""
    require_signatures: bool = False
    """Whether devices that were enrolled without a public key are refused."""
    signature_window_seconds: int = 300
    """How far a signed request's time may be from this machine's clock, and how long its nonce is remembered."""
    rates: Rates = field(default_factory=Rates)
    trusted_proxies: tuple[str, ...] = ()
    """Whose `X-Forwarded-For` is believed."""
    tls: Tls | None = None
    link_seconds: int = 0
    """A download is answered with a link to the object store, good for so long, if the client takes one; 0: never."""
    upload_chunk_bytes: int = SMALLEST_CHUNK
    """Size of the chunks in which a file may come, bytes."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read `COTUNE_*`; where no operator key is set, read or make that of the home folder.

        The mode is embedded if database and broker are those of the home folder's kind, a SQLite file and a folder.
        Otherwise others than this machine's users may reach them: then secrets must be good, and requests signed.

        Raises:
            ValueError: a value that cannot be used; the message names the variable, what was expected and what came.
            OSError: a folder or file that cannot be made or read; the message names it.
        """
        home = _home(environment)
        broker_url = environment.get("COTUNE_BROKER_URL") or embedded_broker_url(home)
        queue_prefix = environment.get("COTUNE_QUEUE_PREFIX", "")
        queue_name(TRAINING_QUEUE, queue_prefix)
        database_url = database_address(environment, f"sqlite:///{home / 'cotune.sqlite3'}")
        folder = queue_folder(broker_url)
        embedded = folder is not None and database_url.startswith("sqlite")
        if not embedded:
            security.check_password(database_url, "COTUNE_DATABASE_URL")
            security.check_password(broker_url, "COTUNE_BROKER_URL")
        prepare_folder(home)
        if folder is not None:
            prepare_folder(folder)
        return cls(
            traced=tracing.wanted(environment),
            home=home,
            database_url=database_url,
            broker_url=broker_url,
            queue_prefix=queue_prefix,
            blobs=read_address(environment, home),
            operator_key=_operator_key(environment, home, embedded=embedded),
            processes=_whole(environment, "COTUNE_API_PROCESSES", 1, MOST_PROCESSES),
            log_format=_choice(environment, "COTUNE_LOG_FORMAT", ("console", "json"), "console"),
            log_level=_choice(environment, "COTUNE_LOG_LEVEL", ("info", "debug", "warning", "error"), "info"),
            upload_limits={kind: _upload_limit(environment, kind) for kind in PartKind},
            link_seconds=_whole(environment, "COTUNE_LINK_SECONDS", 0, 86_400),
            upload_chunk_bytes=_whole(environment, "COTUNE_UPLOAD_CHUNK_BYTES", SMALLEST_CHUNK, LARGEST_CHUNK),
            require_signatures=security.switch(environment, "COTUNE_REQUIRE_SIGNATURES", not embedded),
            rates=security.rates(environment),
            trusted_proxies=security.trusted_proxies(environment),
            tls=security.tls(environment),
        )


def prepare_folder(folder: Path) -> None:
    """Make a folder that only this user can enter, if it is not there.

    Raises:
        OSError: it cannot be made or written; the message names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OSError(f"expected a folder that can be written, got {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"expected a folder that can be written, got {folder}: no permission")


def _home(environment: Mapping[str, str]) -> Path:
    if configured := environment.get("COTUNE_HOME"):
        return Path(configured).expanduser().absolute()
    data = environment.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "cotune"


def _operator_key(environment: Mapping[str, str], home: Path, *, embedded: bool) -> str:
    if key := environment.get("COTUNE_OPERATOR_KEY"):
        return security.check_key(key, "COTUNE_OPERATOR_KEY", embedded=embedded)
    if named := environment.get("COTUNE_OPERATOR_KEY_FILE"):
        path = Path(named).expanduser()
        return security.check_key(_read_key(path), str(path), embedded=embedded)
    path = home / KEY_FILE
    if not path.exists():
        _make_key(path)
    return security.check_key(_read_key(path), str(path), embedded=embedded)


def _make_key(path: Path) -> None:
    # Written under another name first: a reader must never see an empty key.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise OSError(f"expected an operator key in {path}, got: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"expected an operator key of ASCII characters in {path}") from None


def _choice(environment: Mapping[str, str], name: str, choices: tuple[Choice, ...], default: Choice) -> Choice:
    value = environment.get(name) or default
    for choice in choices:
        if value == choice:
            return choice
    raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _whole(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    """Read a whole number; `least` where nothing is set."""
    value = environment.get(name)
    if not value:
        return least
    if not (value.isascii() and value.isdigit()) or not least <= int(value[:20]) <= most:
        raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {value[:40]!r}")
    return int(value)


def _upload_limit(environment: Mapping[str, str], kind: PartKind) -> int:
    name = f"COTUNE_MAX_{kind.name}_BYTES"
    value = environment.get(name)
    if not value:
        return DEFAULT_UPLOAD_BYTES
    if not value.isdecimal() or not 1 <= int(value) <= 2**40:
        raise ValueError(f"{name}: expected bytes, a whole number from 1 to 2^40, got {value!r}")
    return int(value)
