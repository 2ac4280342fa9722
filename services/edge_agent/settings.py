"""What the owner decides: `agent.toml` in the home folder, a few environment overrides, and the credential beside it.

Read once at the entry and passed down; nothing else in the agent reads the environment. Every problem is collected and
shown at once.
"""

import json
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from assets.atomic import write_atomically
from edge_agent.errors import ConfigurationError
from edge_agent.logging import LogFormat, LogLevel
from protocol.base import Name

CONFIG_FILE = "agent.toml"
CREDENTIAL_FILE = "credential"

OVERRIDES = {
    "COTUNE_TORCH_THREADS": ("training", "torch_threads"),
    "COTUNE_LOG_FORMAT": ("log", "format"),
    "COTUNE_LOG_LEVEL": ("log", "level"),
}
"""Environment variable -> the setting it replaces."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSection(_Section):
    """Where the cloud is."""

    url: str
    follow_links: bool = Field(
        default=False, description="Fetch files from where the server points to, without this device's credential."
    )

    @field_validator("url")
    @classmethod
    def _absolute(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as https://cotune.example.org")
        return url.rstrip("/")


class DeviceSection(_Section):
    """Who this device is. `id` was given by the server and never changes."""

    id: str = Field(min_length=1, max_length=128)
    name: Name
    domain: str | None = Field(default=None, max_length=64)


class ModelSection(_Section):
    """The small model that the owner wants tuned: a folder or a Hugging Face hub name."""

    path: str = Field(min_length=1)


class DataSection(_Section):
    """Private rows to train on, and optionally rows to measure on."""

    train: Path
    test: Path | None = None


class TrainingSection(_Section):
    """How much of the machine training may use."""

    torch_threads: int = Field(default=1, ge=1, le=1024)
    checkpoint_steps: int = Field(
        default=20, ge=0, description="Steps between two states of a training on disk; 0: none, a kill costs it all."
    )
    check_memory: bool = Field(
        default=True, description="Refuse a training that is expected not to fit into this device's memory."
    )
    evaluation_batch_size: int = Field(default=64, ge=1, le=4096)
    evaluation_max_length: int = Field(default=512, ge=16, le=131_072, description="Tokens of prompt and answer.")


class LogSection(_Section):
    """What is logged, and how."""

    level: LogLevel = "info"
    format: LogFormat = "console"


class Config(_Section):
    """The whole of `agent.toml`."""

    server: ServerSection
    device: DeviceSection
    model: ModelSection
    data: DataSection
    training: TrainingSection = TrainingSection()
    log: LogSection = LogSection()


@dataclass(frozen=True)
class Settings:
    """Everything the agent needs to know before it starts."""

    home: Path
    config: Config
    credential: str

    @property
    def device_id(self) -> str:
        """The identity that the server gave to this device."""
        return self.config.device.id


def load(home: Path, environment: Mapping[str, str]) -> Settings:
    """Read the home folder.

    Raises:
        ConfigurationError: not enrolled, or anything in `agent.toml`, the environment or the credential is wrong; all
            problems at once.
    """
    path = home / CONFIG_FILE
    if not path.exists():
        raise ConfigurationError([f"{home} is not enrolled: expected {path}; run `cotune-agent enroll` first"])
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError([f"{path}: {error}"]) from None
    for variable, (section, key) in OVERRIDES.items():
        if variable in environment and isinstance(values.setdefault(section, {}), dict):
            values[section][key] = environment[variable]
    problems: list[str] = []
    config = validate(values, str(path), problems)
    credential = read_credential(home / CREDENTIAL_FILE, problems)
    if config and credential and credential.partition(".")[0] != config.device.id:
        problems.append(
            f"{path}: device.id: expected {credential.partition('.')[0]!r} as in the credential, got"
            f" {config.device.id!r}"
        )
    if config is None or problems:
        raise ConfigurationError(problems)
    return Settings(home, config, credential)


def validate(values: Mapping[str, Any], source: str, problems: list[str]) -> Config | None:
    """Return the configuration, or None after adding one line a wrong setting to `problems`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        for entry in error.errors():
            where = ".".join(str(part) for part in entry["loc"])
            received = "" if entry["type"] == "missing" else f", got {str(entry['input'])[:120]!r}"
            problems.append(f"{source}: {where}: {entry['msg']}{received}")
        return None


def read_credential(path: Path, problems: list[str]) -> str:
    """Return the credential, or "" after adding what is wrong with its file to `problems`."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        credential = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: expected the credential of this device: {error}")
        return ""
    if mode & 0o077:
        problems.append(f"{path}: expected permissions 0600, got {mode:04o}; others could act as this device")
    if "." not in credential:
        problems.append(f"{path}: expected `<device id>.<secret>`")
    return credential


def write_credential(home: Path, credential: str) -> None:
    """Write the credential, durably, so that it is never readable by others and never half there."""
    temporary = home / f"{CREDENTIAL_FILE}.new"
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(credential + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, home / CREDENTIAL_FILE)


def write_config(home: Path, config: Config) -> None:
    """Write `agent.toml`, atomically."""
    lines = ["# Written by `cotune-agent enroll`. Change what you like but device.id; restart the agent afterwards."]
    for section, values in config.model_dump(mode="json", exclude_none=True).items():
        lines.append(f"\n[{section}]")
        # A TOML basic string is a JSON string, but for DEL, which the schema's fields have no use for.
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    write_atomically(home / CONFIG_FILE, ("\n".join(lines) + "\n").encode())
