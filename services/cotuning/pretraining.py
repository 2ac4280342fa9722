"""Small causal language models from nothing: train a tokenizer, make a model from its config class, pretrain briefly.

These are the embedded stand-ins for models that a user names: ordinary transformers models with ordinary tokenizers,
so that everything downstream treats them as it would a model of the hub. Pure: texts in, model out; saving is for the
caller. Shapes: B rows, T tokens, V vocabulary.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Architecture = Literal["llama", "gpt2", "qwen3", "bloom"]
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


@dataclass(frozen=True)
class TrainingText:
    """A text to learn. `prompt` is read before it and learned with a lower weight; empty for running text."""

    prompt: str
    text: str


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    weights: list[float]


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


def make_model(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    max_length: int,
    seed: int,
) -> PreTrainedModel:
    """A freshly initialised causal model for `tokenizer`, made from its transformers config class.

    Input and output embeddings are one matrix, as in small models of these families. Weights start larger than the
    families' default of 0.02, which is meant for wide models: narrow ones learn several times faster so. The global
    generator of torch is left as it was.
    """
    ids: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    rotary: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden_size // heads,
        "max_position_embeddings": max_length,
        "initializer_range": hidden_size**-0.5,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "llama":
            return LlamaForCausalLM(LlamaConfig(**ids, **rotary))
        if architecture == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**ids, **rotary))
        if architecture == "gpt2":
            sizes = {
                "initializer_range": hidden_size**-0.5,
                "n_embd": hidden_size,
                "n_layer": layers,
                "n_head": heads,
                "n_positions": max_length,
            }
            no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            return GPT2LMHeadModel(GPT2Config(**ids, **sizes, **no_dropout))
        return BloomForCausalLM(
            BloomConfig(
                **ids, initializer_range=hidden_size**-0.5, hidden_size=hidden_size, n_layer=layers, n_head=heads
            )
        )


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[TrainingText],
    documents: Sequence[TrainingText],
    *,
    document_share: float,
    steps: int,
    batch_size: int,
    max_length: int,
    learning_rate: float,
    prompt_weight: float,
    precision: Literal["float32", "bfloat16"],
    seed: int,
    on_progress: Callable[[int, int, float], None],
) -> float:
    """Train all weights of `model`, in place, by next-token prediction with AdamW and a cosine schedule.

    Args:
        rows: Prompts with responses; longer ones than `max_length` tokens lose their end.
        documents: Running text; longer ones are cut into several of `max_length` tokens.
        document_share: Share of the steps that take a batch of documents; the others take rows.
        prompt_weight: Weight of a prompt's tokens in the loss; a response's token weighs 1.
        precision: `bfloat16` runs the forward pass under autocast.
        seed: Decides the order of the batches.
        on_progress: Called after each step with step, steps and the loss in nats a token; may raise to stop.

    Returns:
        Mean loss of the last tenth of the steps, nats a token. Weighted mean per token of each batch.
    """
    encoded_rows = [_encode(tokenizer, row, prompt_weight, max_length) for row in rows]
    encoded_documents = [
        piece
        for document in documents
        for piece in _pieces(_encode(tokenizer, document, prompt_weight, None), max_length)
    ]
    order = random.Random(seed)
    of_rows = _batches(encoded_rows, batch_size, random.Random(order.random()))
    of_documents = _batches(encoded_documents, batch_size, random.Random(order.random()))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    model.train()
    losses: list[float] = []
    for step in range(steps):
        batch = next(of_documents if encoded_documents and order.random() < document_share else of_rows)
        loss = _loss(model, batch, tokenizer.pad_token_id, precision)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_progress(step + 1, steps, losses[-1])
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _schedule(step: int, steps: int) -> float:
    """Share of the full learning rate: up in a straight line for a tenth of the steps, at most 50, then a cosine."""
    warm_up = max(1, min(50, steps // 10))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _loss(model: PreTrainedModel, batch: list[_Encoded], pad_id: int, precision: str) -> torch.Tensor:
    """Weighted mean cross-entropy per token. Padding is on the right, where a causal model never looks at it: so the
    attention mask is all ones, which lets attention run without one."""
    length = max(len(row.ids) for row in batch)
    ids_BT = torch.tensor([row.ids + [pad_id] * (length - len(row.ids)) for row in batch])
    weights_BT = torch.tensor([row.weights + [0.0] * (length - len(row.ids)) for row in batch])[:, 1:]
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()
    with autocast:
        logits_BTV = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none"
    )
    weights = weights_BT.flatten()
    return (losses * weights).sum() / weights.sum()


def _encode(
    tokenizer: PreTrainedTokenizerFast, text: TrainingText, prompt_weight: float, max_length: int | None
) -> _Encoded:
    """One call for prompt and text, as a prompt is read in use; then the end-of-text token."""
    encoding = tokenizer(text.prompt + text.text, return_offsets_mapping=True, add_special_tokens=False)
    ids = [*encoding["input_ids"], tokenizer.eos_token_id]
    ends = [end for _, end in encoding["offset_mapping"]]
    weights = [prompt_weight if end <= len(text.prompt) else 1.0 for end in ends] + [1.0]
    return _Encoded(ids[:max_length], weights[:max_length])


def _pieces(document: _Encoded, length: int) -> Iterator[_Encoded]:
    for start in range(0, len(document.ids), length):
        piece = _Encoded(document.ids[start : start + length], document.weights[start : start + length])
        if len(piece.ids) > 1:
            yield piece


def _batches(texts: list[_Encoded], batch_size: int, order: random.Random) -> Iterator[list[_Encoded]]:
    """Endless batches of texts of like length, epoch after epoch: little padding, every text once an epoch."""
    while texts:
        shuffled = order.sample(texts, len(texts))
        batches: list[list[_Encoded]] = []
        for start in range(0, len(shuffled), 16 * batch_size):
            alike = iter(sorted(shuffled[start : start + 16 * batch_size], key=lambda each: len(each.ids)))
            while batch := list(islice(alike, batch_size)):
                batches.append(batch)
        order.shuffle(batches)
        yield from batches
