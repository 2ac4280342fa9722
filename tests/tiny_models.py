"""Models of a few thousand parameters with tokenizers trained in memory, for everybody's tests. No network, no files.

Two names are never alike in architecture or tokenizer; `llama` and `llama_proxy` share the tokenizer. Everything is
built once a process and copied, so that a test may train its own.
"""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cotuning.examples import Example
from cotuning.language_model import LanguageModel

NAMES = ("llama", "gpt2", "qwen2", "bloom", "opt")
MAX_POSITIONS = 256

_COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
_THINGS = ("apple", "river", "house", "cloud", "stone", "window", "garden", "letter")


def tiny_examples(count: int = 24, *, start: int = 0, kind: str = "colour") -> list[Example]:
    """Rows that a tiny model can learn: the answer repeats words of the question."""
    rows: list[Example] = []
    for number in range(start, start + count):
        colour = _COLOURS[number % len(_COLOURS)]
        thing = _THINGS[(number // len(_COLOURS) + number) % len(_THINGS)]
        if kind == "colour":
            rows.append(
                Example(f"colour-{number}", f"Name the colour of the {thing}.", colour, f"the {colour} {thing}")
            )
        else:
            rows.append(Example(f"sum-{number}", f"Add {number} and {number % 7}.", "", str(number + number % 7)))
    return rows


def tiny_language_model(name: str, *, seed: int = 0) -> LanguageModel:
    """A fresh copy of one of `NAMES`, or of `llama_proxy`: one layer, narrower, with the tokenizer of `llama`."""
    return copy.deepcopy(_built(name, seed))


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """`byte_bpe`, `byte_bpe_small`, `byte_bpe_digits`, `unigram` (NFKC, metaspace) or `bpe_fallback` (metaspace)."""
    return copy.deepcopy(_tokenizer(kind))


@cache
def _built(name: str, seed: int) -> LanguageModel:
    kind, make = _MODELS[name]
    tokenizer = _tokenizer(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(_ids(tokenizer))
    return LanguageModel.of(model.eval().requires_grad_(False), tokenizer)


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _llama(ids: dict[str, Any], layers: int = 3, hidden: int = 16) -> Any:
    config = LlamaConfig(
        **ids,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def _gpt2(ids: dict[str, Any]) -> Any:
    return GPT2LMHeadModel(GPT2Config(**ids, n_embd=16, n_layer=2, n_head=2, n_positions=MAX_POSITIONS))


def _qwen2(ids: dict[str, Any]) -> Any:
    config = Qwen2Config(
        **ids,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def _bloom(ids: dict[str, Any]) -> Any:
    return BloomForCausalLM(BloomConfig(**ids, hidden_size=16, n_layer=2, n_head=2))


def _opt(ids: dict[str, Any]) -> Any:
    config = OPTConfig(
        **ids,
        hidden_size=16,
        ffn_dim=32,
        word_embed_proj_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITIONS,
    )
    return OPTForCausalLM(config)


_MODELS: dict[str, tuple[str, Any]] = {
    "llama": ("byte_bpe", _llama),
    "llama_proxy": ("byte_bpe", lambda ids: _llama(ids, layers=1, hidden=8)),
    "gpt2": ("byte_bpe_small", _gpt2),
    "qwen2": ("byte_bpe_digits", _qwen2),
    "bloom": ("unigram", _bloom),
    "opt": ("bpe_fallback", _opt),
}


@cache
def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = _TRAINERS[kind](_corpus())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<unk>" if kind in ("unigram", "bpe_fallback") else None,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> list[str]:
    texts = [
        f"Instruction: {row.instruction}\nInput: {row.input}\nOutput:\n{row.output}"
        for kind in ("colour", "sum")
        for row in tiny_examples(64, kind=kind)
    ]
    return [*texts, "The quick brown fox jumps over the lazy dog.", "Café ﬁn ½ – naïve 12,345.67"]


def _byte_bpe(texts: Sequence[str], vocab_size: int, *, single_digits: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _metaspace(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", behavior="isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(prepend_scheme="never")]
    )
    return tokenizer


def _unigram(texts: Sequence[str]) -> Tokenizer:
    tokenizer = _metaspace(Tokenizer(models.Unigram()))
    tokenizer.normalizer = normalizers.NFKC()
    specials = ["<|end|>", "<|pad|>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=specials, unk_token="<unk>", initial_alphabet=["\n"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _bpe_fallback(texts: Sequence[str]) -> Tokenizer:
    tokenizer = _metaspace(Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True)))
    specials = ["<|end|>", "<|pad|>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


_TRAINERS: dict[str, Any] = {
    "byte_bpe": lambda texts: _byte_bpe(texts, 360),
    "byte_bpe_small": lambda texts: _byte_bpe(texts, 300),
    "byte_bpe_digits": lambda texts: _byte_bpe(texts, 420, single_digits=True),
    "unigram": _unigram,
    "bpe_fallback": _bpe_fallback,
}
