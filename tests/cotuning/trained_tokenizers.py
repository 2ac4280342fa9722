"""Small tokenizers of four kinds, trained on a text that holds what breaks alignments."""

import json
import random
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cotuning.token_tables import TokenTable, token_table

KINDS = ("byte_level", "byte_fallback", "unigram", "word_piece")

SENTENCES = (
    "The quick brown fox jumps over the lazy dog; the dog sleeps on.",
    "Co-tuning trains a large model and many small models together.",
    "HTTP status 404 means Not Found, 503 means Service Unavailable.",
    "In 2011 the price rose from 1,204 to 1,999 dollars (about 66%).",
    "def total(values):\n    return sum(value for value in values)\n",
    "SELECT name, count(*) FROM users WHERE age >= 21 GROUP BY name;",
    "naïve café, déjà vu, Ångström, façade, Zürich, e\u0301te\u0301",
    "Половина шестого утра: на улице ещё темно, но уже тепло.",
    "人工知能は言語を理解する。ｶﾞｲﾄﾞ",
    "안녕하세요 세계 각나",
    "half ½, ligatures ﬁ ﬂ, full width ＡＢＣ, roman Ⅷ",
    "emoji \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "tabs\tand  double   spaces\r\nand lines\n\nand nbsp\u00a0here",
    "The unit of international measurement is unbelievable, unthinkable.",
)
"""Training text: words, code, numbers, combining marks, Hangul, half-width kana, ligatures, emoji, odd white space."""


@cache
def trained(kind: str, seed: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer of `kind`; `seed` draws its vocabulary's size and the order and share of its training text."""
    draw = random.Random(f"{kind} {seed}")
    lines = [draw.choice(SENTENCES) for _ in range(60)] + list(SENTENCES)
    size = draw.randint(40, 260)
    return {"byte_level": _byte_level, "byte_fallback": _byte_fallback, "unigram": _unigram, "word_piece": _word_piece}[
        kind
    ](lines, size, draw.random() < 0.5)


@cache
def table_of(kind: str, seed: int = 0) -> TokenTable:
    """The table of `trained(kind, seed)`."""
    return token_table(trained(kind, seed))


def _byte_level(lines: list[str], size: int, bos: bool) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|end|>", "<|start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(lines, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", bos_token="<|start|>")


def _byte_fallback(lines: list[str], size: int, bos: bool) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    raw.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=400 + size, special_tokens=specials + pieces, show_progress=False)
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    plain = json.loads(raw.to_str())
    plain["added_tokens"] = plain["added_tokens"][: len(specials)]  # the trainer calls the byte pieces special
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def _unigram(lines: list[str], size: int, bos: bool) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if bos else "first")
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200 + size, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")


def _word_piece(lines: list[str], size: int, bos: bool) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator(
        lines, trainers.WordPieceTrainer(vocab_size=250 + size, special_tokens=specials, show_progress=False)
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
