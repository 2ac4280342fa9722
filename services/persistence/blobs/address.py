"""Where the blobs are: `COTUNE_BLOBS` is a folder or `s3://<bucket>/<prefix>`.

The credentials for S3 come the way that every S3 client finds them (`AWS_ACCESS_KEY_ID` and
`AWS_SECRET_ACCESS_KEY`, a profile, the machine's role). They are never read here, so they cannot be logged.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from persistence.blobs.folder import FolderBlobStore
from persistence.blobs.interface import BlobStore
from persistence.errors import StorageError

BLOBS = "COTUNE_BLOBS"
ENDPOINT = "COTUNE_S3_ENDPOINT_URL"
SCRATCH = "COTUNE_S3_SCRATCH"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9/._-]*")


@dataclass(frozen=True)
class S3Address:
    """A place in an S3-compatible store. `prefix` is empty or ends with `/`; without an endpoint it is Amazon's."""

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    scratch: Path | None = None
    """Where files wait on this machine that come from or go to the store; None: where `open_store` is told."""


def read_address(environment: Mapping[str, str], home: Path) -> Path | S3Address:
    """Return what the environment names, by default the folder `blobs` of the home folder.

    Raises:
        ValueError: a value that cannot be used; the message names the variable, what was expected and what came.
    """
    value = environment.get(BLOBS) or str(home / "blobs")
    if "://" not in value:
        return Path(value).expanduser().absolute()
    parts = urlsplit(value)
    prefix = parts.path.strip("/")
    wrong = parts.scheme != "s3" or bool(parts.query or parts.fragment)
    if wrong or not _BUCKET.fullmatch(parts.netloc) or not _PREFIX.fullmatch(prefix):
        raise ValueError(f"{BLOBS}: expected a folder or s3://<bucket>/<prefix>, got {_without_user(value)!r}")
    endpoint_url = environment.get(ENDPOINT) or None
    if endpoint_url is not None:
        _check_endpoint(endpoint_url)
    scratch = environment.get(SCRATCH)
    folder = Path(scratch).expanduser().absolute() if scratch else None
    return S3Address(parts.netloc, f"{prefix}/" if prefix else "", endpoint_url, folder)


def open_store(address: Path | S3Address, scratch: Path) -> BlobStore:
    """Open the store.

    Args:
        scratch: a folder of this machine where files wait that come from or go to another one, if the address names
            none.

    Raises:
        StorageError: it cannot be used.
    """
    if isinstance(address, Path):
        return FolderBlobStore(address)
    try:
        from persistence.blobs.s3 import S3BlobStore
    except ModuleNotFoundError as error:
        raise StorageError(
            f"{BLOBS} names an S3 store, for which Python needs the package {error.name}: pip install 'cotune[s3]'"
        ) from None
    return S3BlobStore(address, address.scratch or scratch)


def _check_endpoint(value: str) -> None:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        # Whatever came may hold a password.
        raise ValueError(f"{ENDPOINT}: expected http(s)://<host>[:<port>] without a user, got {_without_user(value)!r}")


def _without_user(value: str) -> str:
    return re.sub(r"//[^/]*@", "//...@", value)[:120]
