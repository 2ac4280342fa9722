"""Names of HTTP headers and of safetensors metadata keys that both sides must spell alike."""

import base64
import binascii

PROTOCOL_HEADER = "Cotune-Protocol"
REQUEST_ID_HEADER = "X-Request-ID"
IDEMPOTENCY_KEY_HEADER = "Idempotency-Key"
IDEMPOTENCY_REPLAYED_HEADER = "Idempotency-Replayed"
"""`true` on an answer that an earlier request with the same key got."""
CONTENT_DIGEST_HEADER = "Content-Digest"
"""RFC 9530: of the bytes of this very message."""
REPR_DIGEST_HEADER = "Repr-Digest"
"""RFC 9530: of the whole file, of which the message may hold a part."""
UPLOAD_LENGTH_HEADER = "Upload-Length"
"""Size of the whole file, bytes; as the IETF's draft on resumable uploads spells it."""
UPLOAD_OFFSET_HEADER = "Upload-Offset"
"""Where the bytes of this message start in the file; in an answer, how many bytes are there."""

LINKS_HEADER = "Cotune-Links"
LINKS_FOLLOW = "follow"
"""Value of `Cotune-Links`: the client can fetch a file from another host, without its credential."""

PEFT = "peft"
"""Key in version 0's metrics: `llm` and `proxy` -> the `adapter_config.json` with which peft loads their adapters."""

ADAPTER_FORMAT = "cotune-adapter/1"
"""Value of the metadata key `format` in adapter and delta files."""

MESSAGE_FORMAT = "cotune-message/1"
"""Value of the metadata key `message_format` in files of messages, of devices and of the server."""

VOCABULARY_FORMAT = "cotune-vocabulary/1"
"""Value of the metadata key `format` in files of tokenizers."""

METADATA_FORMAT = "format"
METADATA_MESSAGE_FORMAT = "message_format"
METADATA_MESSAGE_KIND = "message_kind"
"""Metadata key: which `MessageKind` a message is. What else its header says is the strategy's."""
MESSAGE_ROWS = "message.rows"
"""Name of the tensor of bytes that a server's message carries its rows in, as JSON Lines. A device's has none."""
METADATA_BASE = "base_sha256"
"""Metadata key: SHA-256 of the adapter file that a delta starts from."""
METADATA_PROXY = "proxy_sha256"
"""Metadata key: SHA-256 of the proxy's manifest."""
METADATA_PROBE_SET = "probe_set_sha256"
"""Metadata key: SHA-256 of the probe-set file that logits were computed on."""


def content_digest(sha256_hex: str) -> str:
    """Return the RFC 9530 header value, `sha-256=:<base64>:`, for a hexadecimal SHA-256."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256_hex)).decode()}:"


def parse_content_digest(value: str) -> str:
    """Return the hexadecimal SHA-256 that an RFC 9530 header value names.

    Raises:
        ValueError: no `sha-256=:<base64 of 32 bytes>:` in it.
    """
    for member in value.split(","):
        name, _, encoded = member.strip().partition("=")
        if name.lower() == "sha-256" and len(encoded) > 2 and encoded[0] == encoded[-1] == ":":
            try:
                digest = base64.b64decode(encoded[1:-1], validate=True)
            except binascii.Error:
                break
            if len(digest) == 32:
                return digest.hex()
    raise ValueError(f"expected `sha-256=:<base64 of 32 bytes>:`, got {value[:120]!r}")
