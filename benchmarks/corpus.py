"""Text that every machine has, and tokenizers trained on it: the modules of Python's own standard library."""

import os
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cotuning.tokenizer_training import train_tokenizer

_TRAINING_CHARACTERS = 1_500_000
_PASSAGE_CHARACTERS = 2_500
VOCABULARY_SIZES = {
    "bpe_single_digits": 8192,
    "bpe_whole_numbers": 4096,
    "bpe_byte_fallback": 6144,
    "unigram": 4096,
    "word_piece": 6144,
}


@cache
def passages() -> tuple[str, ...]:
    """Passages of equal length, in the order of the modules' names."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "\n".join(module.read_text(encoding="utf-8", errors="ignore") for module in modules)
    return tuple(text[start : start + _PASSAGE_CHARACTERS] for start in range(0, len(text), _PASSAGE_CHARACTERS))


def held_out(count: int) -> list[str]:
    """The first `count` passages that no tokenizer was trained on."""
    start = _TRAINING_CHARACTERS // _PASSAGE_CHARACTERS
    chosen = list(passages()[start : start + count])
    if len(chosen) < count:
        raise ValueError(f"expected at least {count} passages beside the training text, got {len(chosen)}")
    return chosen


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the kinds in `VOCABULARY_SIZES`."""
    texts = passages()[: _TRAINING_CHARACTERS // _PASSAGE_CHARACTERS]
    size = VOCABULARY_SIZES[kind]
    if kind == "bpe_byte_fallback":
        return _byte_fallback(texts, size)
    if kind == "word_piece":
        return _word_piece(texts, size)
    return train_tokenizer(kind, texts, vocab_size=size, max_length=1 << 20)  # type: ignore[arg-type]


def _byte_fallback(texts: tuple[str, ...], size: int) -> PreTrainedTokenizerFast:
    """As Llama 2's: BPE over U+2581 for spaces, a dummy space at the start, bytes for what it lacks."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")


def _word_piece(texts: tuple[str, ...], size: int) -> PreTrainedTokenizerFast:
    """As BERT's: lower case, no accents, no white space."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    special = ["[UNK]", "[SEP]"]
    raw.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", sep_token="[SEP]")
