"""Ids, secrets and their hashes."""

import hashlib
import secrets
from datetime import datetime


def new_id(prefix: str, now: datetime) -> str:
    """Return an id such as `run_0197c0ffee00a1b2c3d4e5f60718`: it sorts by time, and cannot be guessed.

    48 bits of milliseconds, then 64 random bits; lists and cursors rely on the order.
    """
    return f"{prefix}_{int(now.timestamp() * 1000):012x}{secrets.token_hex(8)}"


def new_secret() -> str:
    """Return 256 random bits as text that needs no escaping anywhere."""
    return secrets.token_urlsafe(32)


def sha256_text(text: str) -> str:
    """Return the hexadecimal SHA-256 of a text. Enough for secrets of 256 random bits: there is nothing to guess."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
