"""What each token id of a tokenizer stands for, as bytes: the static table under alignment and folding.

Built once per tokenizer from its vocabulary alone. Names: V token ids.

Every scheme of writing bytes as vocabulary strings comes down to one of four rules: the byte-level alphabet of GPT-2,
`<0xNN>` byte fallback, U+2581 for a space, or plain text in which WordPiece marks the pieces that continue a word
(so a piece without the mark begins a word, and its bytes begin with a space). Vocabulary *strings* of two tokenizers
must not be compared ("Ġthe" is "▁the"); their bytes may.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_METASPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_TEMPLATE_SENTINEL = "cotune-sentinel"


@dataclass(frozen=True)
class TokenTable:
    """The bytes of every token id.

    Attributes:
        pieces: bytes by id; None for special tokens and for ids that name nothing.
        byte_lengths_V: `len(pieces[id])`, 0 where None; int64.
        end_id: the id that ends the model's turn.
        prefix_ids: what the tokenizer puts before every text (a BOS, a `[CLS]`), often nothing.
        exact: False when the pieces are known not to spell the text (WordPiece drops white space).
        fingerprint: SHA-256 over pieces and `end_id`, hex.
    """

    pieces: tuple[bytes | None, ...]
    byte_lengths_V: Tensor
    end_id: int
    prefix_ids: tuple[int, ...]
    exact: bool
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """The number of ids: one more than the greatest."""
        return len(self.pieces)

    def to(self, device: torch.device | str) -> "TokenTable":
        """The same table with its tensors on `device`."""
        return replace(self, byte_lengths_V=self.byte_lengths_V.to(device))

    @cached_property
    def spelled(self) -> tuple[bytes, ...]:
        """`pieces` with nothing where there is None: what ids spell when joined."""
        return tuple(piece or b"" for piece in self.pieces)


def token_table(tokenizer: Any) -> TokenTable:
    """Build the table of a transformers tokenizer (fast or slow).

    Raises:
        ValueError: the tokenizer names no end-of-turn, end-of-sequence or separator token.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
    special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    scheme = _scheme(tokenizer, vocabulary)
    pieces: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for text, index in vocabulary.items():
        fallback = _BYTE_PIECE.match(text) if scheme.byte_fallback else None
        if fallback:  # before the test for specials: some trainers register the 256 byte pieces as specials
            pieces[index] = bytes([int(fallback[1], 16)])
        elif index in special:
            pieces[index] = None
        elif index in added:
            pieces[index] = str(added[index].content).encode()
        else:
            pieces[index] = scheme.decode(text)
    end_id = _end_id(tokenizer)
    pieces[end_id] = None  # a tokenizer may hold its end of turn as plain text
    return _assemble(tuple(pieces), end_id, _prefix_ids(tokenizer), scheme.exact)


def _assemble(pieces: tuple[bytes | None, ...], end_id: int, prefix_ids: tuple[int, ...], exact: bool) -> TokenTable:
    lengths_V = torch.tensor([len(piece or b"") for piece in pieces], dtype=torch.int64)
    digest = hashlib.sha256(f"cotune-token-table-1 {len(pieces)} {end_id}\n".encode())
    for piece in pieces:
        digest.update(b"-" if piece is None else b"%d:" % len(piece) + piece)
    return TokenTable(
        pieces=pieces,
        byte_lengths_V=lengths_V,
        end_id=end_id,
        prefix_ids=prefix_ids,
        exact=exact,
        fingerprint=digest.hexdigest(),
    )


@dataclass(frozen=True)
class _Scheme:
    decode: Callable[[str], bytes]
    byte_fallback: bool
    exact: bool


def _scheme(tokenizer: Any, vocabulary: dict[str, int]) -> _Scheme:
    """How the vocabulary's strings spell bytes, read from the tokenizer's pipeline (or guessed for slow ones)."""
    if not getattr(tokenizer, "is_fast", False):
        byte_level = any(text.startswith("Ġ") for text in vocabulary)
        return _Scheme(_byte_level_piece if byte_level else _metaspace_piece, "<0x0A>" in vocabulary, True)
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    model = pipeline["model"]
    kinds = _component_types([pipeline["pre_tokenizer"], pipeline["decoder"], pipeline["normalizer"]])
    if "ByteLevel" in kinds:
        return _Scheme(_byte_level_piece, False, True)
    if model["type"] == "WordPiece":
        prefix = model.get("continuing_subword_prefix") or "##"
        return _Scheme(lambda text: _word_piece(text, prefix), False, False)
    suffix = model.get("end_of_word_suffix")
    if suffix:
        return _Scheme(lambda text: text.removesuffix(suffix).encode(), False, False)
    return _Scheme(_metaspace_piece, bool(model.get("byte_fallback")) or "ByteFallback" in kinds, True)


def _component_types(components: list[dict[str, Any] | None]) -> set[str]:
    kinds: set[str] = set()
    waiting: list[Any] = list(components)
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("type"), str):
                kinds.add(value["type"])
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return kinds


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's bijection from printable characters to bytes (`bytes_to_unicode` in its encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(rest)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _byte_level_piece(text: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in text)
    except KeyError:  # outside the alphabet: a token that was added as plain text
        return text.encode()


def _metaspace_piece(text: str) -> bytes:
    return text.replace(_METASPACE, " ").encode()


def _word_piece(text: str, prefix: str) -> bytes:
    if text.startswith(prefix) and text != prefix:
        return text.removeprefix(prefix).encode()
    return text.encode() if stands_alone(text[:1]) else f" {text}".encode()


def stands_alone(character: str) -> bool:
    """Whether a WordPiece word may begin with `character` without white space before it: marks, kana, ideographs."""
    punctuation = unicodedata.category(character or " ")[0] == "P" or character in "$+<=>^`|~"
    return punctuation or "\u3040" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff" or character > "\uffff"


def _end_id(tokenizer: Any) -> int:
    """The token after an assistant's message in the chat template, else EOS, else the separator."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _TEMPLATE_SENTINEL}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        tail = rendered.rpartition(_TEMPLATE_SENTINEL)[2]
        special = set(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        for index in tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if index in special:
                return int(index)
    for index in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if index is not None:
            return int(index)
    raise ValueError("expected a tokenizer with an EOS or separator token, or a chat template that ends a turn")


def _prefix_ids(tokenizer: Any) -> tuple[int, ...]:
    """The special ids that the tokenizer puts before a text when asked for special tokens."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(int(index) for index in full[:start])
    return ()
