"""What the owner decides: `agent.toml` in the home folder, a few environment overrides, and the credential beside it.

Read once at the entry and passed down; nothing else in the agent reads the environment. Every problem is collected and
shown at once.
"""

import json
import ssl
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from assets.atomic import write_atomically
from edge_agent.errors import ConfigurationError
from edge_agent.logging import LogFormat, LogLevel
from edge_agent.signing import KEY_FILE, read_key
from protocol.base import Name

CONFIG_FILE = "agent.toml"
CREDENTIAL_FILE = "credential"

OVERRIDES = {
    "COTUNE_TORCH_THREADS": ("training", "torch_threads"),
    "COTUNE_LOG_FORMAT": ("log", "format"),
    "COTUNE_LOG_LEVEL": ("log", "level"),
}
"""Environment variable -> the setting it replaces."""

_IN_WORDS = {"missing": "expected a value, got none", "extra_forbidden": "there is no such setting"}
"""What pydantic says in the words of its own models, by the type of its error."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSection(_Section):
    """Where the cloud is, and how it and this device know each other."""

    url: str
    ca_file: Path | None = Field(
        default=None, description="PEM; the authority of the server's certificate, if its own."
    )
    client_certificate: Path | None = Field(default=None, description="PEM; where the server asks for one.")
    client_key: Path | None = None
    rotate_credential_days: int = Field(
        default=30, ge=0, le=3650, description="So old, the credential is replaced; 0: never by itself."
    )
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
    max_adapter_rank: int | None = Field(
        default=None, ge=1, le=1024, description="Highest rank at which a shared adapter is trained here; none: any."
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
    credential: str = field(repr=False)
    signing_key: Ed25519PrivateKey | None = field(default=None, repr=False)
    """None: enrolled before there were keys; requests are not signed."""
    tls: ssl.SSLContext | None = None
    """What the server's certificate is checked with; None: the machine's authorities."""

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
    key_file = home / KEY_FILE
    signing_key = read_key(key_file, problems) if key_file.exists() else None
    tls = tls_context(config.server, problems) if config else None
    if config is None or problems:
        raise ConfigurationError(problems)
    return Settings(home, config, credential, signing_key, tls)


def tls_context(server: ServerSection, problems: list[str]) -> ssl.SSLContext | None:
    """Return what the certificates of `agent.toml` make, or None if it names none, or after adding to `problems`."""
    if server.ca_file is None and server.client_certificate is None and server.client_key is None:
        return None
    try:
        context = ssl.create_default_context(cafile=server.ca_file)
        if server.client_certificate is not None:
            context.load_cert_chain(server.client_certificate, server.client_key, password=lambda: "")
    except OSError as error:  # also ssl.SSLError
        files = [str(path) for path in (server.ca_file, server.client_certificate, server.client_key) if path]
        problems.append(f"server: expected PEM certificates and their key in {', '.join(files)}: {error.strerror}")
        return None
    return context


def validate(values: Mapping[str, Any], source: str, problems: list[str]) -> Config | None:
    """Return the configuration, or None after adding one line a wrong setting to `problems`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        for entry in error.errors():
            where = ".".join(str(part) for part in entry["loc"])
            received = "" if entry["type"] == "missing" else f", got {str(entry['input'])[:120]!r}"
            message = _IN_WORDS.get(entry["type"], entry["msg"])
            problems.append(f"{source}: {where}: {message}{received}")
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
    write_atomically(home / CREDENTIAL_FILE, f"{credential}\n".encode("ascii"))


def write_config(home: Path, config: Config) -> None:
    """Write `agent.toml`, atomically."""
    lines = ["# Written by `cotune-agent enroll`. Change what you like but device.id; restart the agent afterwards."]
    for section, values in config.model_dump(mode="json", exclude_none=True).items():
        lines.append(f"\n[{section}]")
        # A TOML basic string is a JSON string, but for DEL, which the schema's fields have no use for.
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    write_atomically(home / CONFIG_FILE, ("\n".join(lines) + "\n").encode())
