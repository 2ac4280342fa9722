"""Tokenizers as files that travel, so that who reads another party's logits can read rows as that party does.

One safetensors file, never pickle and never code: the tensor `tokenizer` holds the `tokenizers` library's own JSON,
compressed; the header says which tokens are special, what the chat template puts around a question and after an answer,
and the fingerprint of the token table that must come out. The template itself, which is a program, does not travel:
what it writes does, and a template made here of those literals stands for it. Before a file leaves, it is read again
and compared with the tokenizer that it was made of.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from assets.errors import TensorFileError, VocabularyError, is_panic
from assets.tensors import read_tensors, tensors_to_bytes
from cotuning.examples import Example, render_prompt
from cotuning.vocabulary import Reads, Vocabulary
from protocol.headers import METADATA_FORMAT, VOCABULARY_FORMAT

MOST_TEXT_BYTES = 128 * 2**20
"""Of the JSON, unpacked: three times that of 262,144 tokens."""

MOST_TOKENS = 2**22
"""Ids are places in tables, so one that is too great would ask for any amount of memory."""

_TENSOR = "tokenizer"
_ABOUT, _FINGERPRINT = "about", "fingerprint"
_Special = Literal["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
_SPECIAL: tuple[_Special, ...] = get_args(_Special)
_MARK = "cotune-mark"


class _Chat(BaseModel):
    """What a chat template writes, and whether it strips a question of white space."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: str = Field(max_length=16_384)
    after: str = Field(max_length=16_384)
    end: str = Field(max_length=16_384)
    strips: bool


class _About(BaseModel):
    """What the JSON of the `tokenizers` library does not say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    special_tokens: dict[_Special, str]
    """They become arguments of the tokenizer's constructor, which has others: a chat template, files."""
    split_special_tokens: bool
    chat: _Chat | None


@dataclass(frozen=True)
class _Parts:
    text: str
    about: _About


def vocabulary_file(reads: Reads) -> bytes:
    """A tokenizer as a file; equal tokenizers give the same bytes.

    Args:
        reads: whose.

    Raises:
        VocabularyError: it is none of the `tokenizers` library, or does more than the file can say.
    """
    tokenizer = reads.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise VocabularyError(f"expected a tokenizer of the `tokenizers` library, got {type(tokenizer).__name__}")
    parts = _Parts(_text(tokenizer), _about(tokenizer))
    content = parts.text.encode()
    if len(content) > MOST_TEXT_BYTES:
        raise VocabularyError(f"expected a tokenizer of at most {MOST_TEXT_BYTES} bytes, got {len(content)}")
    again = _vocabulary(parts, reads.device)
    for what in ("fingerprint", "prefix_ids", "exact"):
        ours, theirs = getattr(reads.table, what), getattr(again.table, what)
        if ours != theirs:
            raise VocabularyError(f"expected a tokenizer that reads the same from its JSON; its {what} is not {ours}")
    packed = torch.frombuffer(bytearray(zlib.compress(content, 9)), dtype=torch.uint8)
    header = {
        METADATA_FORMAT: VOCABULARY_FORMAT,
        _FINGERPRINT: reads.table.fingerprint,
        _ABOUT: json.dumps(parts.about.model_dump(mode="json"), sort_keys=True),
    }
    return tensors_to_bytes({_TENSOR: packed}, header)


def read_vocabulary(path: Path, device: torch.device | str = "cpu") -> Vocabulary:
    """What `vocabulary_file` wrote. Nothing in the file is run.

    Args:
        path: of the file.
        device: where what it encodes is wanted.

    Raises:
        VocabularyError: it is no such file, too large, or the tokenizer in it is not the one that its header names.
    """
    try:
        tensors, metadata = read_tensors(path)
    except TensorFileError as error:
        raise VocabularyError(str(error)) from None
    if metadata.get(METADATA_FORMAT) != VOCABULARY_FORMAT:
        received = metadata.get(METADATA_FORMAT, "nothing")
        raise VocabularyError(f"header metadata `{METADATA_FORMAT}`: expected {VOCABULARY_FORMAT}, got {received[:80]}")
    try:
        about = _About.model_validate_json(metadata.get(_ABOUT, ""))
    except ValidationError as error:
        raise VocabularyError(f"header metadata `{_ABOUT}`: {error.error_count()} wrong fields") from None
    vocabulary = _vocabulary(_Parts(_unpacked(tensors), about), torch.device(device))
    expected, received = metadata.get(_FINGERPRINT), vocabulary.table.fingerprint
    if received != expected:
        raise VocabularyError(f"expected a tokenizer with the fingerprint {expected}, the file's has {received}")
    return vocabulary


def _unpacked(tensors: Mapping[str, Tensor]) -> str:
    packed = tensors.get(_TENSOR)
    if packed is None or len(tensors) != 1 or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise VocabularyError(f"expected a vector of bytes {_TENSOR!r} and nothing else, got {sorted(tensors)[:5]}")
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(packed.numpy().tobytes(), MOST_TEXT_BYTES)
        if not stream.eof:
            raise VocabularyError(f"expected a tokenizer that unpacks to at most {MOST_TEXT_BYTES} bytes, got more")
        return text.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise VocabularyError(f"expected compressed JSON: {error}") from None


def _vocabulary(parts: _Parts, device: torch.device) -> Vocabulary:
    about = parts.about
    with refusing("the JSON of a tokenizer"):
        raw = Tokenizer.from_str(parts.text)
        greatest = max(raw.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= greatest < MOST_TOKENS:
        raise VocabularyError(f"expected token ids from 0 to {MOST_TOKENS - 1}, the greatest is {greatest}")
    if dropout := getattr(raw.model, "dropout", None):
        raise VocabularyError(f"expected a tokenizer that always reads a text the same, got a dropout of {dropout}")
    with refusing("a tokenizer that reads a text"):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, split_special_tokens=about.split_special_tokens, **about.special_tokens
        )
        if about.chat is not None:
            tokenizer.chat_template = _template(about.chat)
        return Vocabulary.of(tokenizer, device)


@contextmanager
def refusing(expected: str) -> Iterator[None]:
    """Refuse another party's tokenizer for whatever using it raises: a file can be well formed and still not work.

    Args:
        expected: of the tokenizer, for the message.

    Raises:
        VocabularyError: something was raised, be it a panic of the library.
    """
    try:
        yield
    except ValueError as error:
        raise VocabularyError(str(error)) from error
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):
            raise VocabularyError(f"expected {expected}: {error}") from None
        raise


def _text(tokenizer: Any) -> str:
    """The JSON, without what was last asked of the tokenizer about lengths."""
    values = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def _about(tokenizer: Any) -> _About:
    named = {name: getattr(tokenizer, name, None) for name in _SPECIAL}
    try:
        return _About(
            special_tokens={name: str(token) for name, token in named.items() if token is not None},
            split_special_tokens=bool(getattr(tokenizer, "split_special_tokens", False)),
            chat=_chat(tokenizer) if getattr(tokenizer, "chat_template", None) else None,
        )
    except ValidationError as error:
        raise VocabularyError(
            f"expected a chat template that writes less: {error.error_count()} wrong fields"
        ) from None


def _chat(tokenizer: Any) -> _Chat:
    """What the template puts around a question, found by letting it write one."""

    def prompt(question: str) -> str:
        return render_prompt(tokenizer, Example("", question, "", ""))

    before, found, after = prompt(_MARK).partition(_MARK)
    loose = f" {_MARK}\n"
    kept, stripped = f"{before}{loose}{after}", f"{before}{_MARK}{after}"
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    end = str(tokenizer.apply_chat_template(asked, tokenize=False)).rpartition(_MARK)[2]
    if not found or prompt(loose) not in (kept, stripped):
        raise VocabularyError("expected a chat template that writes a question as it is, between two texts")
    return _Chat(before=before, after=after, end=end, strips=prompt(loose) == stripped)


def _template(chat: _Chat) -> str:
    """A chat template of literals alone."""
    content = "message['content'] | trim" if chat.strips else "message['content']"
    question = f"{{{{ {_literal(chat.before)} }}}}{{{{ {content} }}}}{{{{ {_literal(chat.after)} }}}}"
    answer = f"{{{{ message['content'] }}}}{{{{ {_literal(chat.end)} }}}}"
    return (
        f"{{% for message in messages %}}{{% if message['role'] == 'user' %}}{question}"
        f"{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
    )


def _literal(text: str) -> str:
    """A text as a string of the template language: nothing in it but hexadecimal escapes."""
    return '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"'
