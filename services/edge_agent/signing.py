"""Signs every request of this device (RFC 9421), with an Ed25519 key that is made here and never leaves.

The server knows the public key only: whoever reads its database, its logs or the traffic cannot act as this device.
"""

import base64
import hashlib
import hmac
import secrets
import stat
from collections.abc import Callable, Generator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from assets.atomic import write_atomically
from protocol.signatures import (
    LABEL,
    SIGNATURE_HEADER,
    SIGNATURE_INPUT_HEADER,
    format_signature,
    request_values,
    signature_base,
    signature_parameters,
    signed_components,
)

KEY_FILE = "signing.key"
CLOCK_STEP_SECONDS = 5.0
"""A difference to the server's clock that is worth another attempt; `Date` itself is whole seconds."""

log = structlog.get_logger(__name__)


def make_key(home: Path) -> Ed25519PrivateKey:
    """Return the key of this home folder, made if it is not there: durable and readable by its owner only."""
    path = home / KEY_FILE
    if not path.exists():
        private = Ed25519PrivateKey.generate().private_bytes_raw()
        write_atomically(path, base64.b64encode(private) + b"\n")
    problems: list[str] = []
    key = read_key(path, problems)
    if key is None:
        raise ValueError("; ".join(problems))
    return key


def public_text(key: Ed25519PrivateKey) -> str:
    """Return the public key as the server wants it: 32 bytes, base64."""
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def request_key(key: Ed25519PrivateKey, content: bytes) -> str:
    """Return the idempotency key of a request that must be done once, however often this device has to send it.

    It is made from the signing key, which is on disk before the first attempt, and from the content: a kill between two
    attempts changes nothing, another content is another request, and nobody else can guess it.
    """
    return hmac.digest(key.private_bytes_raw(), b"idempotency-key\0" + content, hashlib.sha256).hex()


def read_key(path: Path, problems: list[str]) -> Ed25519PrivateKey | None:
    """Return the key, or None after adding what is wrong with its file to `problems`. What is in it is not told."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            problems.append(f"{path}: expected permissions 0600, got {mode:04o}; others could act as this device")
            return None
        return Ed25519PrivateKey.from_private_bytes(base64.b64decode(path.read_bytes().strip(), validate=True))
    except OSError as error:
        problems.append(f"{path}: expected the signing key of this device: {error.strerror}")
    except ValueError:
        problems.append(f"{path}: expected 32 bytes of an Ed25519 key, base64")
    return None


class DeviceAuthentication(httpx.Auth):
    """Adds the credential and, with a key, the signature to each attempt; a nonce is never used twice.

    The server says its time in every answer. Where it refuses a request and its clock differs from ours, the difference
    is remembered and the request is sent once more; an upload, which cannot be, is sent again by whoever retries it.
    """

    def __init__(self, credential: str, key: Ed25519PrivateKey | None, now: Callable[[], datetime]) -> None:
        self.credential = credential
        self._key = key
        self._now = now
        self._ahead_seconds = 0.0

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        """Sign, send, and once more if it was the clock."""
        self._sign(request)
        response = yield request
        refused = response.status_code == httpx.codes.UNAUTHORIZED and self._key is not None
        if refused and self._learn_time(response) and isinstance(request.stream, httpx.ByteStream):
            self._sign(request)
            yield request

    def _sign(self, request: httpx.Request) -> None:
        request.headers["Authorization"] = f"Bearer {self.credential}"
        if self._key is None:
            return
        path, _, query = request.url.raw_path.decode("ascii").partition("?")
        values = request_values(request.method, path, query, request.headers.get_list)
        components = signed_components(values)
        parameters = signature_parameters(
            components,
            created=int(self._now().timestamp() + self._ahead_seconds),
            nonce=secrets.token_urlsafe(18),
            keyid=self.credential.partition(".")[0],
        )
        base = signature_base(components, values, parameters)
        request.headers[SIGNATURE_INPUT_HEADER] = f"{LABEL}={parameters}"
        request.headers[SIGNATURE_HEADER] = format_signature(self._key.sign(base))

    def _learn_time(self, response: httpx.Response) -> bool:
        try:
            server = parsedate_to_datetime(response.headers.get("Date", ""))
            ahead_seconds = (server - self._now()).total_seconds()
        except (ValueError, TypeError):  # no date, or one without a zone
            return False
        if abs(ahead_seconds - self._ahead_seconds) < CLOCK_STEP_SECONDS:
            return False
        log.warning("clock_differs", server_ahead_seconds=round(ahead_seconds))
        self._ahead_seconds = ahead_seconds
        return True
