"""Content-Digest, there and back."""

import base64
import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.headers import content_digest, parse_content_digest


@given(st.binary(min_size=32, max_size=32))
def test_there_and_back(digest: bytes) -> None:
    assert parse_content_digest(content_digest(digest.hex())) == digest.hex()


def test_the_example_of_the_standard() -> None:
    """RFC 9530, appendix B.1: the digest of `{"hello": "world"}` and a line feed."""
    header = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:"
    assert content_digest(hashlib.sha256(b'{"hello": "world"}\n').hexdigest()) == header
    assert parse_content_digest(header) == hashlib.sha256(b'{"hello": "world"}\n').hexdigest()


def test_other_algorithms_beside_it_are_passed_over() -> None:
    value = content_digest("ab" * 32)
    assert parse_content_digest(f"sha-512=:AAAA:, {value}") == "ab" * 32
    assert parse_content_digest(value.replace("sha-256", "SHA-256")) == "ab" * 32


@pytest.mark.parametrize(
    "value",
    [
        "",
        "sha-256",
        "sha-256=",
        "sha-256=::",
        "sha-256=:AAAA:",
        "sha-256=abc",
        "sha-256=:not base64!:",
        f"sha-256={base64.b64encode(bytes(32)).decode()}",
        f"sha-512=:{base64.b64encode(bytes(64)).decode()}:",
        "sha-256=:" + "A" * 5000 + ":",
    ],
)
def test_anything_else_is_refused_with_a_short_message(value: str) -> None:
    with pytest.raises(ValueError, match="expected `sha-256=") as caught:
        parse_content_digest(value)
    assert len(str(caught.value)) < 200


@given(st.text(max_size=100))
def test_any_text_gives_a_digest_or_a_value_error(value: str) -> None:
    with contextlib.suppress(ValueError):
        assert len(parse_content_digest(value)) == 64
