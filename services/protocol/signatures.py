"""What a signed request's signature covers, and how it is written: the part of RFC 9421 that we use. No cryptography.

A device signs the method, the path, the query, and the header fields that say what is sent: the digest of the body and
of the file (RFC 9530), the file's size, and where in it the body starts. With them the time, a nonce and its id. So
nobody who reads or changes traffic can use a request for another purpose, or twice. Not covered: the authority and the
scheme, which a proxy in front of the API may change; a device's key is known to one server only.

One signature a request is read, in the one spelling that RFC 8941 calls canonical, so what was verified and what is
acted upon cannot differ. A general library (http-message-signatures 3.0) was looked at: it verifies digests of whole
bodies through adapters for other HTTP clients than ours, where an upload must be checked as it streams, and brings a
second library to parse structured fields; this is the hundred lines that are left. Ed25519 itself is `cryptography`'s.
"""

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SIGNATURE_HEADER = "Signature"
SIGNATURE_INPUT_HEADER = "Signature-Input"

LABEL = "cotune"
ALGORITHM = "ed25519"
SIGNED_ALWAYS = ("@method", "@path", "@query")
SIGNED_BODY = "content-digest"
SIGNED_FIELDS = (SIGNED_BODY, "repr-digest", "upload-length", "upload-offset")
"""Header fields that are signed wherever they are; the first one must be there with a body."""
SIGNATURE_BYTES = 64

LARGEST_CREATED = 2**40
"""Seconds; what lies after it is no time that a clock could show."""

_INPUT = re.compile(
    r'([a-z*][a-z0-9_.*-]*)=(\(("[a-z0-9@-]+"(?: "[a-z0-9@-]+")*)?\)((?:;[a-z]+=(?:\d{1,15}|"[!#-\[\]-~ ]*"))*))'
)
_PARAMETER = re.compile(r';([a-z]+)=(\d{1,15}|"[^"]*")')


class SignatureError(ValueError):
    """The headers are not a signature that this module can read; the message says what was expected."""


@dataclass(frozen=True)
class SignatureInput:
    """A read `Signature-Input` header."""

    label: str
    components: tuple[str, ...]
    created: int
    """When it was signed, seconds since 1970 (UTC)."""
    nonce: str
    keyid: str
    parameters: str
    """The value of `@signature-params`, as it came."""


def signature_parameters(components: Sequence[str], *, created: int, nonce: str, keyid: str) -> str:
    """Return the value of `@signature-params`; with `cotune=` before it that of `Signature-Input`."""
    listed = " ".join(f'"{name}"' for name in components)
    return f'({listed});created={created};nonce="{nonce}";keyid="{keyid}";alg="{ALGORITHM}"'


def signature_base(components: Sequence[str], values: Mapping[str, str], parameters: str) -> bytes:
    """Return the bytes that are signed (RFC 9421, section 2.5).

    Args:
        components: what is covered, in order.
        values: the value of each of them.
        parameters: the value of `@signature-params`.

    Raises:
        SignatureError: a component that the message does not have.
    """
    missing = [name for name in components if name not in values]
    if missing:
        raise SignatureError(f"the signature covers {', '.join(missing)}, which the request does not have")
    lines = [f'"{name}": {values[name]}' for name in components]
    return "\n".join([*lines, f'"@signature-params": {parameters}']).encode("latin-1", "replace")


def request_values(
    method: str, raw_path: str, query: str, field_lines: Callable[[str], Sequence[str]]
) -> dict[str, str]:
    """Return the values of a request's components (RFC 9421, sections 2.1 and 2.2).

    Args:
        raw_path: as on the wire, percent-encoded, without the query.
        query: as on the wire, without the question mark.
        field_lines: the values of the header field of a name, of each line one, none where it is not there.
    """
    values = {"@method": method, "@path": raw_path or "/", "@query": f"?{query}"}
    lines = {name: field_lines(name) for name in SIGNED_FIELDS}
    return values | {name: ", ".join(line.strip() for line in found) for name, found in lines.items() if found}


def signed_components(values: Mapping[str, str]) -> list[str]:
    """Return what the signature of a request with these values must cover, in the order in which a device writes it."""
    return [*SIGNED_ALWAYS, *(name for name in SIGNED_FIELDS if name in values)]


def parse_signature_input(value: str) -> SignatureInput:
    """Read a `Signature-Input` header with one signature.

    Raises:
        SignatureError: another form, or `created`, `nonce`, `keyid` or `alg` is missing, doubled or of the wrong kind.
    """
    match = _INPUT.fullmatch(value.strip())
    if match is None:
        raise SignatureError(
            f'`{SIGNATURE_INPUT_HEADER}`: expected one signature, `{LABEL}=("@method" …);created=…;nonce="…";keyid="…"`'
        )
    label, parameters, listed, tail = match.groups()
    components = tuple(name.strip('"') for name in (listed or "").split())
    found = _PARAMETER.findall(tail)
    named = dict(found)
    if len(set(components)) < len(components) or len(named) < len(found):
        raise SignatureError(f"`{SIGNATURE_INPUT_HEADER}`: a component or a parameter is there twice")
    created = named.get("created", "")
    texts = [named.get(name, "") for name in ("nonce", "keyid")]
    if not created.isdigit() or int(created) > LARGEST_CREATED or not all(_is_short_text(text) for text in texts):
        raise SignatureError(
            f"`{SIGNATURE_INPUT_HEADER}`: expected `created` as seconds, and `nonce` and `keyid` as texts of 1 to 128"
        )
    if named.get("alg", f'"{ALGORITHM}"') != f'"{ALGORITHM}"':
        raise SignatureError(f"`{SIGNATURE_INPUT_HEADER}`: expected alg {ALGORITHM}, got {named['alg'][:40]}")
    nonce, keyid = (text.strip('"') for text in texts)
    return SignatureInput(label, components, int(created), nonce, keyid, parameters)


def format_signature(signature: bytes) -> str:
    """Return the value of the `Signature` header."""
    return f"{LABEL}=:{base64.b64encode(signature).decode()}:"


def parse_signature(value: str, label: str) -> bytes:
    """Return the bytes of the one signature in a `Signature` header.

    Raises:
        SignatureError: it is not `<label>=:<base64 of 64 bytes>:`.
    """
    encoded = value.strip().removeprefix(f"{label}=:").removesuffix(":")
    if value.strip() == f"{label}=:{encoded}:":
        try:
            signature = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            signature = b""
        if len(signature) == SIGNATURE_BYTES:
            return signature
    raise SignatureError(f"`{SIGNATURE_HEADER}`: expected `{label}=:<base64 of {SIGNATURE_BYTES} bytes>:`")


def _is_short_text(text: str) -> bool:
    return len(text) > 2 and text[0] == text[-1] == '"' and len(text) <= 130
