"""Signatures against the example of RFC 9421, and against everything that is not quite one."""

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from protocol.signatures import (
    SIGNED_ALWAYS,
    SignatureError,
    format_signature,
    parse_signature,
    parse_signature_input,
    request_values,
    signature_base,
    signature_parameters,
    signed_components,
)


def no_fields(_name: str) -> tuple[str, ...]:
    return ()


# RFC 9421, section 2.5 and appendix B.1.4 and B.2.6: `test-key-ed25519` and the request that it signs.
RFC_KEY = Ed25519PrivateKey.from_private_bytes(base64.b64decode("n4Ni+HpISpVObnQMW0wOhCKROaIKqKtW/2ZYb2p9KcU="))
RFC_COMPONENTS = ("date", "@method", "@path", "@authority", "content-type", "content-length")
RFC_PARAMETERS = (
    '("date" "@method" "@path" "@authority" "content-type" "content-length")'
    ';created=1618884473;keyid="test-key-ed25519"'
)
RFC_SIGNATURE = "wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw=="


def test_the_example_of_the_standard() -> None:
    values = request_values("POST", "/foo", "param=Value&Pet=dog", no_fields) | {
        "date": "Tue, 20 Apr 2021 02:07:55 GMT",
        "@authority": "example.com",
        "content-type": "application/json",
        "content-length": "18",
    }
    base = signature_base(RFC_COMPONENTS, values, RFC_PARAMETERS)
    assert base64.b64encode(RFC_KEY.sign(base)).decode() == RFC_SIGNATURE
    RFC_KEY.public_key().verify(parse_signature(f"sig-b26=:{RFC_SIGNATURE}:", "sig-b26"), base)


def test_what_was_written_is_read() -> None:
    parameters = signature_parameters([*SIGNED_ALWAYS, "content-digest"], created=17, nonce="n-1", keyid="dev_1")
    read = parse_signature_input(f"cotune={parameters}")
    assert read.components == ("@method", "@path", "@query", "content-digest")
    assert (read.label, read.created, read.nonce, read.keyid) == ("cotune", 17, "n-1", "dev_1")
    assert read.parameters == parameters
    assert parse_signature(format_signature(b"s" * 64), "cotune") == b"s" * 64


def test_an_empty_path_and_query_have_their_values() -> None:
    """RFC 9421, 2.2.6 and 2.2.7: an empty path is `/`, no query is `?`."""
    assert request_values("GET", "", "", no_fields) == {"@method": "GET", "@path": "/", "@query": "?"}


def test_the_fields_that_say_what_is_sent_are_signed_wherever_they_are() -> None:
    """RFC 9421, 2.1: several lines of a field are one value."""
    lines = {"upload-offset": ["4194304"], "content-digest": [" sha-256=:one: ", "sha-256=:two:"]}
    values = request_values("PATCH", "/x", "", lambda name: lines.get(name, []))
    assert values["content-digest"] == "sha-256=:one:, sha-256=:two:"
    assert signed_components(values) == ["@method", "@path", "@query", "content-digest", "upload-offset"]


GOOD = 'cotune=("@method" "@path");created=1;nonce="n";keyid="k";alg="ed25519"'


@pytest.mark.parametrize(
    "value",
    [
        "",
        "cotune",
        GOOD + ", other=" + GOOD.partition("=")[2],
        GOOD.replace("created=1", "created=-1"),
        GOOD.replace("created=1", 'created="1"'),
        GOOD.replace("created=1", "created=999999999999999"),
        GOOD.replace(";created=1", ""),
        GOOD.replace(';nonce="n"', ""),
        GOOD.replace('nonce="n"', 'nonce=""'),
        GOOD.replace('nonce="n"', f'nonce="{"n" * 129}"'),
        GOOD.replace('nonce="n"', "nonce=12"),
        GOOD.replace('keyid="k"', 'keyid="k\\""'),
        GOOD.replace('"@path"', '"@path" "@path"'),
        GOOD.replace('"@path"', '"@path";req'),
        GOOD.replace("ed25519", "hmac-sha256"),
        GOOD + ";created=2",
        GOOD.replace(";", "; "),
        GOOD.replace('("', '( "'),
    ],
)
def test_other_forms_are_refused(value: str) -> None:
    assert parse_signature_input(GOOD).nonce == "n"
    with pytest.raises(SignatureError, match="Signature-Input"):
        parse_signature_input(value)


@pytest.mark.parametrize("value", ["", "cotune=::", "cotune=:AAAA:", "other=:" + "A" * 86 + "==:", "cotune=:!:", "x"])
def test_what_is_no_signature(value: str) -> None:
    with pytest.raises(SignatureError, match="64 bytes"):
        parse_signature(value, "cotune")


def test_a_component_that_the_request_lacks() -> None:
    with pytest.raises(SignatureError, match="content-digest"):
        signature_base(("@method", "content-digest"), request_values("GET", "/", "", no_fields), "()")


@given(st.text(st.characters(codec="latin-1"), max_size=200), st.text(st.characters(codec="latin-1"), max_size=200))
def test_any_header_is_read_or_refused(inputs: str, signature: str) -> None:
    for read in (lambda: parse_signature_input(inputs), lambda: parse_signature(signature, "cotune")):
        try:
            read()
        except SignatureError:
            continue


@given(
    st.tuples(
        st.sampled_from(["GET", "POST", "PUT"]), st.text('abc/%2."\n', max_size=9), st.text("ab=&?:\n", max_size=9)
    ),
    st.tuples(
        st.sampled_from(["GET", "POST", "PUT"]), st.text('abc/%2."\n', max_size=9), st.text("ab=&?:\n", max_size=9)
    ),
)
def test_different_requests_have_different_bases(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    """No line feed can come in a request line; without one no value can look like the next component's line."""
    bases = []
    for method, path, query in (one, other):
        path, query = path.replace("\n", ""), query.replace("\n", "")  # noqa: PLW2901
        bases.append(
            (
                signature_base(SIGNED_ALWAYS, request_values(method, path or "/", query, no_fields), "p"),
                (method, path or "/", query),
            )
        )
    assert (bases[0][0] == bases[1][0]) == (bases[0][1] == bases[1][1])
