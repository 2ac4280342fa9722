"""Spoils uploads or their signatures, sends them, and has somebody else judge whether each was rightly admitted.

The judge is the safetensors library and a comparison written here, not the service's own reader.
"""

import base64
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError, deserialize

ADMITTED = frozenset({200, 201})
RIGHT = "right"
SIGNINGS = ("none", "another key", "another path", "another body", "a character changed", "an old one", "once more")
"""What may be wrong with a signature."""

DTYPES: tuple[Any, ...] = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "BOOL", "F8_E4M3", "f32", "", 3,
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (-1, 0, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 1e300, 1.5, True, None, "1", [])
TEXTS: tuple[Any, ...] = ("", "x", "\x00", "é" * 40, "../../etc/passwd", "a" * 5000, None, 7, [], {})


@dataclass(frozen=True)
class Upload:
    """One request's body and what its headers say about it."""

    body: bytes
    length: int
    digest: str
    kind: str
    signing: str = RIGHT


@dataclass
class Tally:
    """What came of the mutated uploads."""

    sent: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    admitted_rightly: int = 0
    wrong: list[str] = field(default_factory=list)
    """Admitted, though the judge says no; or answered with 5xx."""
    stricter: Counter[str] = field(default_factory=Counter)
    """Refused, though the judge finds nothing wrong."""

    def add(self, name: str, upload: Upload, status: int, code: str, *, admissible: bool) -> None:
        """Note one answer."""
        self.sent[name] += 1
        self.answers[f"{status} {code}".strip()] += 1
        admitted = status in ADMITTED
        if status >= 500:
            self.wrong.append(f"{name}: {status} {code}; {upload.body[:200]!r}")
        elif admitted and not admissible:
            self.wrong.append(f"{name}: admitted ({status} {code}); {upload.body[:400]!r}")
        elif admitted:
            self.admitted_rightly += 1
        elif admissible:
            self.stricter[f"{name}: {code}"] += 1


def digest_of(body: bytes) -> str:
    """Return the `Content-Digest` of a body."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def plain(body: bytes, kind: str) -> Upload:
    """An upload whose headers fit its body."""
    return Upload(body, len(body), digest_of(body), kind)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return a valid file's header and data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: str, data: bytes) -> bytes:
    """Put a file together, whatever the header."""
    raw = header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


class Judge:
    """Says whether a part may be admitted.

    Args:
        valid: by kind of part, a file that the round admits.
        bound: by kind of part, the metadata that tie it to its round.
    """

    def __init__(self, valid: Mapping[str, bytes], bound: Mapping[str, Mapping[str, str]]) -> None:
        self._tensors = {kind: _read(content)[0] for kind, content in valid.items()}
        self._bound = bound

    def admissible(self, upload: Upload) -> bool:
        """Return whether the whole request is what the round asked for, as far as a header can tell."""
        if upload.signing != RIGHT or upload.length != len(upload.body) or upload.digest != digest_of(upload.body):
            return False
        try:
            tensors, metadata = _read(upload.body)
        except (SafetensorError, ValueError, RecursionError):
            return False
        if upload.kind == "adapter_delta" and tensors != self._tensors[upload.kind]:
            return False
        # A logits file need not say what it belongs to (the worker knows); what it does say must be right.
        optional = upload.kind == "logits"
        return all(
            metadata.get(key, wanted if optional else None) == wanted
            for key, wanted in self._bound[upload.kind].items()
        )


def _read(content: bytes) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, Any]]:
    tensors = {name: (info["dtype"], tuple(info["shape"])) for name, info in deserialize(content)}  # type: ignore[no-untyped-call]
    header, _ = split(content)
    metadata = header.get("__metadata__", {})
    return tensors, metadata if isinstance(metadata, dict) else {}


Mutation = Callable[[random.Random, bytes, str], Upload]


def flip_length(chance: random.Random, content: bytes, kind: str) -> Upload:
    """A bit of the header's length."""
    return plain(_flip(content, chance.randrange(64)), kind)


def flip_header(chance: random.Random, content: bytes, kind: str) -> Upload:
    """One to three bits of the header."""
    length = int.from_bytes(content[:8], "little")
    for _ in range(chance.randint(1, 3)):
        content = _flip(content, 64 + chance.randrange(8 * length))
    return plain(content, kind)


def flip_data(chance: random.Random, content: bytes, kind: str) -> Upload:
    """A bit of the values, which is for the worker to judge."""
    start = 8 + int.from_bytes(content[:8], "little")
    return plain(_flip(content, chance.randrange(8 * start, 8 * len(content))), kind)


def spoil_entry(chance: random.Random, content: bytes, kind: str) -> Upload:
    """A dtype, a size or an offset of one tensor."""
    header, data = split(content)
    entry = header[chance.choice([name for name in header if name != "__metadata__"])]
    place = chance.choice(("dtype", "shape", "data_offsets", "keys"))
    if place == "dtype":
        entry["dtype"] = chance.choice(DTYPES)
    elif place == "keys":
        entry.pop(chance.choice(list(entry))) if chance.random() < 0.5 else entry.update(extra=1)
    elif chance.random() < 0.2:
        entry[place] = chance.choice(NUMBERS)
    elif chance.random() < 0.3:
        entry[place] = [*entry[place], chance.choice(NUMBERS)] if chance.random() < 0.5 else entry[place][:-1]
    else:
        at = chance.randrange(len(entry[place]))
        entry[place][at] = chance.choice((*NUMBERS, entry[place][at] + 1, entry[place][at] - 1, entry[place][at] + 4))
    return plain(join(json.dumps(header), data), kind)


def spoil_names(chance: random.Random, content: bytes, kind: str) -> Upload:
    """A tensor renamed, gone, added or there twice."""
    header, data = split(content)
    names = [name for name in header if name != "__metadata__"]
    name, other = chance.choice(names), chance.choice(names)
    what = chance.randrange(5)
    if what == 0:
        header = {(str(chance.choice(TEXTS)) if key == name else key): value for key, value in header.items()}
    elif what == 1:
        del header[name]
    elif what == 2:
        header["added"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    elif what == 3:
        header[name], header[other] = header[other], header[name]
    text = json.dumps(header)
    if what == 4:
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}" + "}"
    return plain(join(text, data), kind)


def spoil_metadata(chance: random.Random, content: bytes, kind: str) -> Upload:
    """A value of the metadata, or all of it."""
    header, data = split(content)
    metadata = header.get("__metadata__", {})
    key = chance.choice([*metadata, "format", "proxy_sha256", "probe_set_sha256", "unheard of"])
    what = chance.randrange(4)
    if what == 0:
        metadata[key] = chance.choice(TEXTS)
    elif what == 1:
        metadata.pop(key, None)
    elif what == 2:
        value = str(metadata.get(key, ""))
        metadata[key] = value[:-1] + chance.choice("0123456789abcdefx")
    else:
        header["__metadata__"] = chance.choice((*TEXTS, *NUMBERS))
    return plain(join(json.dumps(header), data), kind)


def rewrite_harmlessly(chance: random.Random, content: bytes, kind: str) -> Upload:
    """The same header in another order or with spaces: to be admitted."""
    header, data = split(content)
    entries = list(header.items())
    chance.shuffle(entries)
    text = json.dumps(dict(entries), indent=chance.choice((None, 0, 1)))
    return plain(join(text + " " * chance.randrange(9), data), kind)


def replace_header(chance: random.Random, content: bytes, kind: str) -> Upload:
    """Something else in the header's place."""
    _, data = split(content)
    texts = ("", "{}", "[]", "null", "{" * 5000, "[" * 5000, '{"a":' * 3000, '"', "{\x00}", " {}", "\ufeff{}", "NaN")
    return plain(join(chance.choice(texts), data), kind)


def cut_or_grow(chance: random.Random, content: bytes, kind: str) -> Upload:
    """Bytes missing or too many at the end, with headers that fit."""
    if chance.random() < 0.5:
        return plain(content[: chance.randrange(len(content))], kind)
    return plain(content + chance.randbytes(chance.randint(1, 64)), kind)


def wrong_digest(chance: random.Random, content: bytes, kind: str) -> Upload:
    """A digest of other bytes, or no digest."""
    right = digest_of(content)
    digest = chance.choice(
        (
            digest_of(content + b"x"), "", "sha-256=", "sha-256=::", right[:-2] + ":", right.replace("256", "512"),
            right.upper(), f"md5={right[8:]}", "sha-256=:" + "A" * 5000 + ":",
        )
    )  # fmt: skip
    return Upload(content, len(content), digest, kind)


def wrong_length(chance: random.Random, content: bytes, kind: str) -> Upload:
    """A `Content-Length` that is not the body's."""
    other = chance.choice((0, 1, 7, 8, len(content) - 1, len(content) + 1, len(content) + 1000, 2**40, 2**70))
    return Upload(content, other, digest_of(content), kind)


def spoil_signature(chance: random.Random, content: bytes, kind: str) -> Upload:
    """A valid part whose signature is not."""
    return Upload(content, len(content), digest_of(content), kind, chance.choice(SIGNINGS))


def other_part(chance: random.Random, content: bytes, kind: str) -> Upload:
    """A delta sent as logits, or the other way round, and sometimes a bit flipped too."""
    swapped = "logits" if kind == "adapter_delta" else "adapter_delta"
    return plain(content if chance.random() < 0.5 else _flip(content, chance.randrange(8 * len(content))), swapped)


MUTATIONS: dict[Mutation, int] = {
    flip_length: 4, flip_header: 20, flip_data: 4, spoil_entry: 20, spoil_names: 10, spoil_metadata: 12,
    rewrite_harmlessly: 4, replace_header: 4, cut_or_grow: 8, wrong_digest: 4, wrong_length: 2, other_part: 4,
    spoil_signature: 4,
}  # fmt: skip
"""Each with its weight, percent."""


def name_of(mutation: Mutation) -> str:
    """Return what a mutation is called in reports."""
    return mutation.__name__.replace("_", " ")


def _flip(content: bytes, bit: int) -> bytes:
    spoilt = bytearray(content)
    spoilt[bit // 8] ^= 1 << bit % 8
    return bytes(spoilt)
