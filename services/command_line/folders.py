"""The folders and the key that `cotune` uses on this machine. The only place here that reads the environment."""

import os
import secrets
import ssl
import tempfile
from collections.abc import Mapping
from pathlib import Path

from command_line.errors import BadInput, NotAuthorised

DEFAULT_PORT = 8000
ADDRESS_FILE = "address"
KEY_FILE = "operator.key"


def home_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the embedded service's state: `COTUNE_HOME`, else `~/.local/share/cotune`."""
    if configured := environment.get("COTUNE_HOME"):
        return Path(configured).expanduser()
    data = environment.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "cotune"


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of base models: `COTUNE_CACHE`, else `~/.cache/cotune`."""
    if configured := environment.get("COTUNE_CACHE"):
        return Path(configured).expanduser()
    cache = environment.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "cotune"


def prepare(folder: Path, *, what: str, variable: str) -> Path:
    """Make `folder` if need be and make sure that it can be written.

    Args:
        what: What the folder is for, for the message.
        variable: The environment variable or option that names another folder.

    Raises:
        BadInput: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadInput(
            f"expected {what} {folder} to be a folder that can be written, got: {reason}",
            next_step=f"name another folder with {variable}, or change the permissions of this one",
        ) from None
    return folder.resolve()


def make_operator_key(home: Path) -> Path:
    """Return the file of the embedded service's operator key, written with mode 0600 if it is not there yet."""
    path = home / KEY_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    return path


def operator_key(environment: Mapping[str, str] = os.environ) -> str:
    """Return the operator key: `COTUNE_OPERATOR_KEY`, `COTUNE_OPERATOR_KEY_FILE`, or that of the embedded home.

    Raises:
        NotAuthorised: none of them has one.
    """
    if key := environment.get("COTUNE_OPERATOR_KEY"):
        return key
    named = environment.get("COTUNE_OPERATOR_KEY_FILE")
    path = Path(named) if named else home_folder(environment) / KEY_FILE
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotAuthorised(
            f"expected an operator key in {path}, got: {reason}",
            next_step="set COTUNE_OPERATOR_KEY or COTUNE_OPERATOR_KEY_FILE, or start `cotune up` on this machine",
        ) from None
    if not key:
        raise NotAuthorised(f"expected an operator key in {path}, got an empty file")
    return key


def server_address(environment: Mapping[str, str] = os.environ) -> str:
    """Return the API's address: `COTUNE_SERVER`, else that of the last `cotune up`, else the default port here."""
    if server := environment.get("COTUNE_SERVER"):
        return server
    try:
        return (home_folder(environment) / ADDRESS_FILE).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return f"http://127.0.0.1:{DEFAULT_PORT}"


def api_scheme(environment: Mapping[str, str] = os.environ) -> str:
    """Return what an API that is started with this environment speaks: `https` if it names a certificate."""
    return "https" if environment.get("COTUNE_TLS_CERTIFICATE") else "http"


def tls_context(environment: Mapping[str, str] = os.environ) -> ssl.SSLContext | None:
    """Return what the API's certificate is checked with, and what is shown to an API that asks for one.

    `COTUNE_CA_FILE` names an authority of one's own, `COTUNE_CLIENT_CERTIFICATE` and `COTUNE_CLIENT_KEY` a certificate
    to show; None: the machine's authorities, and nothing to show.

    Raises:
        BadInput: one of them cannot be read.
    """
    names = ("COTUNE_CA_FILE", "COTUNE_CLIENT_CERTIFICATE", "COTUNE_CLIENT_KEY")
    authority, certificate, key = (environment.get(name) or None for name in names)
    if authority is None and certificate is None:
        return None
    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate is not None:
            context.load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:  # also ssl.SSLError
        raise BadInput(
            f"expected PEM files in {', '.join(names)}, got {authority}, {certificate}, {key}: {error.strerror}"
        ) from None
    return context
