"""Checks that a request was signed by the device that sends it, a moment ago, and for the first time (RFC 9421).

The body is bound by `Content-Digest`, which the signature covers: JSON bodies are compared with it in `strict_json`,
uploads while they come (`updates.receiving`). It also covers of which file a chunk is, and where it belongs.
"""

import base64
from dataclasses import dataclass
from datetime import datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from starlette.requests import Request

from cloud_api.brief_memory import BriefMemory, keep_seconds
from protocol.errors import DomainError, ErrorCode
from protocol.signatures import (
    SIGNATURE_HEADER,
    SIGNATURE_INPUT_HEADER,
    SIGNED_BODY,
    SignatureError,
    SignatureInput,
    parse_signature,
    parse_signature_input,
    request_values,
    signature_base,
    signed_components,
)


@dataclass(frozen=True)
class RequestParts:
    """What of a request its signature may be about."""

    values: dict[str, str]
    has_body: bool
    signature_input: str | None
    signature: str | None


def parts_of(request: Request) -> RequestParts:
    """Read a request's head."""
    headers, scope = request.headers, request.scope
    raw_path: bytes = scope.get("raw_path") or scope["path"].encode()
    return RequestParts(
        values=request_values(
            request.method,
            raw_path.decode("latin-1"),
            scope["query_string"].decode("latin-1"),
            headers.getlist,
        ),
        has_body=headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in headers,
        signature_input=headers.get(SIGNATURE_INPUT_HEADER),
        signature=headers.get(SIGNATURE_HEADER),
    )


def verify(
    request: RequestParts,
    device_id: str,
    public_key: str,
    *,
    memory: BriefMemory,
    now: datetime,
    window_seconds: int,
) -> None:
    """Return if the device has signed this request. The nonce is spent with it. May wait for Redis.

    Args:
        public_key: the device's, Ed25519, base64.
        window_seconds: how far its clock may be off.

    Raises:
        DomainError: SIGNATURE_REQUIRED, SIGNATURE_INVALID, SIGNATURE_EXPIRED or REQUEST_REPLAYED.
    """
    if request.signature_input is None or request.signature is None:
        detail = f"device {device_id} was enrolled with a public key: expected `{SIGNATURE_INPUT_HEADER}` and"
        raise DomainError(ErrorCode.SIGNATURE_REQUIRED, f"{detail} `{SIGNATURE_HEADER}` (RFC 9421), got neither or one")
    try:
        given = parse_signature_input(request.signature_input)
        signature = parse_signature(request.signature, given.label)
        _check_coverage(given, device_id, request)
        base = signature_base(given.components, request.values, given.parameters)
    except SignatureError as error:
        raise DomainError(ErrorCode.SIGNATURE_INVALID, str(error)) from None
    _check_time(given.created, now, window_seconds)
    try:
        Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key)).verify(signature, base)
    except (InvalidSignature, ValueError):
        detail = f"the signature is not that of device {device_id} over {', '.join(given.components)} of this request"
        raise DomainError(ErrorCode.SIGNATURE_INVALID, detail) from None
    # Last, so that only the device itself can spend its nonces.
    if not memory.first_time(device_id, given.nonce, given.created, keep_seconds(window_seconds)):
        detail = "a request with this nonce was here before; sign each attempt again, with a new nonce"
        raise DomainError(ErrorCode.REQUEST_REPLAYED, detail)


def _check_coverage(given: SignatureInput, device_id: str, request: RequestParts) -> None:
    needed = {*signed_components(request.values), *([SIGNED_BODY] if request.has_body else [])}
    if lacking := needed - set(given.components):
        raise SignatureError(f"expected a signature that covers {', '.join(sorted(needed))}; it lacks {lacking}")
    if given.keyid != device_id:
        raise SignatureError(f"expected keyid {device_id!r}, that of the credential, got {given.keyid[:80]!r}")


def _check_time(created: int, now: datetime, window_seconds: int) -> None:
    seconds = int(now.timestamp())
    if abs(created - seconds) > window_seconds:
        detail = (
            f"signed at {created}, and this server's clock says {seconds} ({now.isoformat(timespec='seconds')}): "
            f"expected at most {window_seconds} s in between"
        )
        raise DomainError(ErrorCode.SIGNATURE_EXPIRED, detail, expected=seconds, received=created)
