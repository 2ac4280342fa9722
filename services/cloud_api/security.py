"""The part of the settings that keeps others out: limits, TLS, proxies, signatures, and secrets that are none."""

import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cloud_api.brief_memory import Rate

SHORTEST_KEY = 16
"""Characters. A shorter operator key could be guessed over the network."""

SHORTEST_KEY_DEPLOYED = 32
"""Characters, outside the embedded mode: others than this machine's users can try."""

SHORTEST_PASSWORD = 8
FEWEST_CHARACTERS = 8
"""Different ones in a key that somebody made by hand: `aaaa…` has one."""

KNOWN_WORDS = ("change", "example", "operator", "password", "placeholder", "secret", "default", "cotune")
"""What examples are made of. 256 random bits contain none of these but by a chance of one in a hundred thousand."""

KNOWN_PASSWORDS = frozenset(
    {
        "postgres",
        "password",
        "cotune",
        "redis",
        "admin",
        "root",
        "secret",
        "example",
        "changeme",
        "change-me",
        "12345678",
    }
)


@dataclass(frozen=True)
class Rates:
    """The limits; `COTUNE_RATE_<NAME>=<per second>/<burst>` changes one."""

    address: Rate = field(default_factory=lambda: Rate(1000, 5000))
    """All requests of one address. Generous: a whole fleet may sit behind one."""
    device: Rate = field(default_factory=lambda: Rate(20, 200))
    enrolment: Rate = field(default_factory=lambda: Rate(2, 100))
    """Enrolments from one address."""
    failure: Rate = field(default_factory=lambda: Rate(0.2, 20))
    """Wrong credentials from one address (of a device: from one address under one id)."""


@dataclass(frozen=True)
class Tls:
    """What the API itself speaks TLS with, where no proxy in front of it does."""

    certificate: Path
    key: Path
    client_ca: Path | None
    """If given, only clients with a certificate of this authority are answered."""


def rates(environment: Mapping[str, str]) -> Rates:
    """Read `COTUNE_RATE_*`. Raises ValueError."""
    changed = {
        each.name: _rate(f"COTUNE_RATE_{each.name.upper()}", value)
        for each in fields(Rates)
        if (value := environment.get(f"COTUNE_RATE_{each.name.upper()}"))
    }
    return Rates(**changed)


def _rate(name: str, value: str) -> Rate:
    per_second, _, burst = value.partition("/")
    try:
        rate = Rate(float(per_second), int(burst))
    except ValueError:
        rate = Rate(0, 0)
    if not (0 < rate.per_second <= 1e6 and 1 <= rate.burst <= 10**7):
        raise ValueError(f"{name}: expected <requests a second>/<burst>, for example 20/200, got {value[:40]!r}")
    return rate


def tls(environment: Mapping[str, str]) -> Tls | None:
    """Read `COTUNE_TLS_*` and load what they name, so that a wrong file is told at the start.

    Raises:
        ValueError: one without the other, or files that are no certificate and its key.
        OSError: a file that cannot be read.
    """
    names = ("COTUNE_TLS_CERTIFICATE", "COTUNE_TLS_KEY", "COTUNE_TLS_CLIENT_CA")
    certificate, key, client_ca = (
        Path(value).expanduser() if (value := environment.get(name)) else None for name in names
    )
    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise ValueError(f"expected both {names[0]} and {names[1]}, got one of them")
    for name, path in zip(names, (certificate, key, client_ca), strict=True):
        if path is not None and not path.is_file():
            raise OSError(f"{name}: expected a file, got {path}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
        if client_ca is not None:
            context.load_verify_locations(client_ca)
    except ssl.SSLError as error:
        raise ValueError(f"expected a PEM certificate and its key in {certificate} and {key}: {error.reason}") from None
    return Tls(certificate, key, client_ca)


def trusted_proxies(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Read `COTUNE_TRUSTED_PROXIES`, addresses or networks with commas: whose `X-Forwarded-For` is believed.

    Raises:
        ValueError: something that is neither.
    """
    found = tuple(part.strip() for part in environment.get("COTUNE_TRUSTED_PROXIES", "").split(",") if part.strip())
    for each in found:
        try:
            ipaddress.ip_network(each)
        except ValueError:
            message = f"COTUNE_TRUSTED_PROXIES: expected addresses or networks such as 10.0.0.0/8, got {each[:60]!r}"
            raise ValueError(message) from None
    return found


def switch(environment: Mapping[str, str], name: str, default: bool) -> bool:
    """Read a setting that is on or off. Raises ValueError."""
    value = environment.get(name, "").lower()
    known = {"": default, "1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    if value not in known:
        raise ValueError(f"{name}: expected on or off, got {value[:40]!r}")
    return known[value]


def check_key(key: str, where: str, *, embedded: bool) -> str:
    """Return the bootstrap operator key if it can be used. The key itself is never part of a message.

    Raises:
        ValueError: too short, other characters than printable ASCII, or an example's.
    """
    shortest = SHORTEST_KEY if embedded else SHORTEST_KEY_DEPLOYED
    if len(key) < shortest or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{where}: expected an operator key of at least {shortest} printable ASCII characters without spaces, "
            f"got {len(key)} characters"
        )
    known = [word for word in KNOWN_WORDS if word in key.lower()]
    if not embedded and (known or len(set(key)) < FEWEST_CHARACTERS):
        what = f"one with the word {known[0]!r}" if known else f"one of {len(set(key))} different characters"
        raise ValueError(f"{where}: expected a random operator key (openssl rand -hex 32), got {what}")
    return key


def check_password(url: str, where: str) -> None:
    """Refuse a password in an address that everybody knows or can guess. No password is another way to get in.

    Raises:
        ValueError: without the password.
    """
    try:
        password = unquote(urlsplit(url).password or "")
    except ValueError:  # no address at all; who connects to it says so
        return
    if password and (len(password) < SHORTEST_PASSWORD or password.lower() in KNOWN_PASSWORDS):
        raise ValueError(
            f"{where}: expected a password of its own, at least {SHORTEST_PASSWORD} characters, got a known one"
        )
