"""The worker's settings, read once from the environment at the entry and passed down."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from persistence.addresses import database_address
from persistence.blobs import S3Address, read_address
from protocol.queue import embedded_broker_url, queue_folder, queue_name
from protocol.statuses import TRAINING_QUEUE

LogFormat = Literal["console", "json"]


@dataclass(frozen=True)
class Settings:
    """Where everything is, and how patient the worker is. Times in seconds."""

    home: Path
    """Embedded state: the default place of the database, the queue and the blobs, and of materialised models."""
    database_url: str = field(repr=False)
    """May hold a password."""
    broker_url: str
    queue_prefix: str
    blobs: Path | S3Address
    log_format: LogFormat
    torch_threads: int | None
    """Threads of torch's CPU kernels; None leaves torch's own choice."""
    lease_seconds: float
    """A job not renewed for so long belongs to nobody: what a kill -9 costs before another worker takes it."""
    sweep_seconds: float
    resend_after_seconds: float
    """A queued job sent so long ago and not claimed is sent again."""
    offline_after_seconds: float
    """A device not heard from for so long is shown as offline."""
    orphan_sweep_seconds: float = 3600.0
    """How often the blob store is looked through for what nothing refers to."""
    orphan_grace_seconds: float = 86_400.0
    """A file without a reference is left alone for so long. Longer than any stage of a round should be."""
    stall_seconds: float = 1800.0
    """A stage that shows no progress for so long stands still. Longer than a training step on slow hardware."""
    long_call_seconds: float = 7200.0
    """The same where it is known to do one long call: loading or downloading a model, making and storing a proxy."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read `COTUNE_*`.

        Raises:
            ValueError: a value that cannot be used; the message names the variable, what was expected and what came.
            OSError: a file that cannot be read; the message names it.
        """
        home = _home(environment)
        settings = cls(
            home=home,
            database_url=database_address(environment, f"sqlite:///{home / 'cotune.sqlite3'}"),
            broker_url=environment.get("COTUNE_BROKER_URL") or embedded_broker_url(home),
            queue_prefix=environment.get("COTUNE_QUEUE_PREFIX", ""),
            blobs=read_address(environment, home),
            log_format=_log_format(environment.get("COTUNE_LOG_FORMAT") or "console"),
            torch_threads=_threads(environment.get("COTUNE_TORCH_THREADS")),
            lease_seconds=_seconds(environment, "COTUNE_LEASE_SECONDS", 20.0),
            sweep_seconds=_seconds(environment, "COTUNE_SWEEP_SECONDS", 5.0),
            resend_after_seconds=_seconds(environment, "COTUNE_RESEND_AFTER_SECONDS", 10.0),
            offline_after_seconds=_seconds(environment, "COTUNE_OFFLINE_AFTER_SECONDS", 90.0),
            orphan_sweep_seconds=_seconds(environment, "COTUNE_ORPHAN_SWEEP_SECONDS", 3600.0),
            orphan_grace_seconds=_seconds(environment, "COTUNE_ORPHAN_GRACE_SECONDS", 86_400.0, 30 * 86_400),
            stall_seconds=_seconds(environment, "COTUNE_STALL_SECONDS", 1800.0),
            long_call_seconds=_seconds(environment, "COTUNE_LONG_CALL_SECONDS", 7200.0),
        )
        queue_folder(settings.broker_url)
        queue_name(TRAINING_QUEUE, settings.queue_prefix)
        return settings


def _home(environment: Mapping[str, str]) -> Path:
    if configured := environment.get("COTUNE_HOME"):
        return Path(configured).expanduser().absolute()
    data = environment.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "cotune"


def _log_format(value: str) -> LogFormat:
    match value:
        case "console" | "json":
            return value
    raise ValueError(f"COTUNE_LOG_FORMAT: expected console or json, got {value!r}")


def _threads(value: str | None) -> int | None:
    if not value:
        return None
    if not value.isdecimal() or not 1 <= int(value) <= 1024:
        raise ValueError(f"COTUNE_TORCH_THREADS: expected a whole number from 1 to 1024, got {value!r}")
    return int(value)


def _seconds(environment: Mapping[str, str], name: str, default: float, most: int = 86_400) -> float:
    value = environment.get(name)
    if not value:
        return default
    try:
        seconds = float(value)
    except ValueError:
        seconds = float("nan")
    if not 0.1 <= seconds <= most:
        raise ValueError(f"{name}: expected seconds from 0.1 to {most}, got {value!r}")
    return seconds


def prepare_folders(settings: Settings) -> None:
    """Make the folders that this process writes to.

    Raises:
        OSError: one of them cannot be made or written; the message names it.
    """
    folders = [settings.home, queue_folder(settings.broker_url)]
    for folder in (each for each in folders if each is not None):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"expected a folder that can be written, got {folder}")
