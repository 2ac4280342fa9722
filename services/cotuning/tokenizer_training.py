"""Tokenizers from nothing: byte-level BPE of three ways to cut numbers, and Unigram with bytes for what it lacks."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TokenizerKind = Literal["bpe_single_digits", "bpe_digit_groups", "bpe_whole_numbers", "unigram"]

END = "<|end|>"
PAD = "<|pad|>"
UNKNOWN = "<unk>"
BYTE_FALLBACK_PENALTY = 10.0
"""How much less likely than the rarest piece a single byte is to a Unigram tokenizer, in nats."""

# How Qwen cuts text before byte-pair merging, every digit by itself, and how Llama 3 does, digits in threes. GPT-2's
# rule, numbers whole, is built into `ByteLevel`.
SINGLE_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGIT_GROUPS = SINGLE_DIGITS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def train_tokenizer(
    kind: TokenizerKind, texts: Iterable[str], *, vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of one kind on `texts`.

    Args:
        kind: `bpe_...`: byte-level BPE, by how it cuts numbers; `unigram`: Metaspace Unigram that normalises to NFKC,
            with bytes for what it lacks.
        texts: Read once.
        vocab_size: Entries in all, special tokens and bytes included.
        max_length: Written into the tokenizer as the longest input of its model, in tokens.

    Returns:
        A tokenizer with end-of-text and padding tokens, that adds nothing to what it encodes.
    """
    tokenizer = _train_unigram(texts, vocab_size) if kind == "unigram" else _train_bpe(kind, texts, vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN if kind == "unigram" else None,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _train_bpe(kind: TokenizerKind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if kind == "bpe_whole_numbers":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = Regex(SINGLE_DIGITS if kind == "bpe_single_digits" else DIGIT_GROUPS)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(split, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Lines are cut off first, so that no piece spans a line's end: a prompt's last newline stays a clean seam."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", behavior="isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(prepend_scheme="never")]
    )
    special = [END, PAD, UNKNOWN]
    own_pieces = vocab_size - 256
    trainer = trainers.UnigramTrainer(
        vocab_size=own_pieces // 2, special_tokens=special, unk_token=UNKNOWN, show_progress=False
    )
    # Every character of the training text becomes a piece; rare ones are left to their bytes.
    kept = _without_rare_characters(list(texts), own_pieces // 4)
    tokenizer.train_from_iterator(kept, trainer)
    pieces = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    lowest = min(pieces.values()) - BYTE_FALLBACK_PENALTY
    # The trainer seeds its pieces from parts that several distinct words share, and so never makes a piece of the
    # most frequent words themselves.
    words = Counter(word for text in kept for word in _words(tokenizer, text))
    total = words.total()
    for word, count in words.most_common(own_pieces - own_pieces // 2):
        pieces[word] = math.log(count / total)
    # Nor can it make byte pieces; without them a character that it never saw could not be written.
    pieces |= {f"<0x{byte:02X}>": lowest for byte in range(256)}
    tokenizer.model = models.Unigram(list(pieces.items()), unk_id=special.index(UNKNOWN), byte_fallback=True)
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in special])
    return tokenizer


def _without_rare_characters(texts: list[str], kept: int) -> list[str]:
    characters = Counter(chain.from_iterable(texts))
    rare = {ord(character): None for character, _ in characters.most_common()[kept:]}
    return [text.translate(rare) for text in texts]


def _words(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """What the tokenizer cuts `text` into before it looks for pieces."""
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
        yield word
