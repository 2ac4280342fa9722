"""Small causal language models from nothing: make a model from its config class, pretrain it, measure it.

These are the embedded stand-ins for models that a user names: ordinary transformers models with ordinary tokenizers
(`tokenizer_training`), so that everything downstream treats them as it would a model of the hub. Pure: texts in, model
out; saving is for the caller. Shapes: B rows, T tokens, V vocabulary.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
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

from cotuning.checkpoints import Checkpoints
from cotuning.evaluation import bits_per_byte
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.pretraining_text import Batch, SimilarLengths, TrainingText, Windows, token_stream
from cotuning.schedules import ScheduleName
from cotuning.seeding import derive_seed, isolated_generators
from cotuning.training import Learner, Precision, Step, train

Architecture = Literal["llama", "gpt2", "qwen3", "bloom"]
STAGE = "pretraining"
_BETAS = (0.9, 0.95)


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


@dataclass(frozen=True)
class Pretrained:
    """What a pretraining came to.

    Attributes:
        loss: mean over the last tenth of the steps, nats a token, weighted as in training.
        num_tokens: read, padding not counted.
    """

    loss: float
    num_tokens: int


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
    precision: Precision,
    seed: int,
    on_progress: Callable[[int, int, float], None],
    packed: bool = False,
    micro_batch_size: int | None = None,
    schedule: ScheduleName = "cosine",
    weight_decay: float = 0.05,
    measure_every: int = 0,
    on_measure: Callable[[int, int], None] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Pretrained:
    """Train all weights of `model`, in place and where it lies, by next-token prediction with AdamW.

    Args:
        rows: Prompts with responses; longer ones than `max_length` tokens lose their end.
        documents: Running text; longer ones are cut into several of `max_length` tokens.
        document_share: Share of the steps that take a batch of documents; the others take rows.
        batch_size: Rows of `max_length` tokens a step.
        prompt_weight: Weight of a prompt's tokens in the loss; a response's token weighs 1.
        precision: `bfloat16` runs the forward pass under autocast.
        seed: Decides the order of the batches.
        on_progress: Called after each step with step, steps and the loss in nats a token; may raise to stop.
        packed: Several texts a row, see `pretraining_text.Windows`; else one a row, padded.
        micro_batch_size: Rows in memory at a time, all if not given; changes nothing but rounding.
        measure_every: `on_measure` is called after every so many steps and after the last; 0: never.
        on_measure: Gets the steps taken and the tokens read; the model is in evaluation mode.
        checkpoints: The training goes on from the state that is there, with the bits of one never interrupted.
            `on_measure` is called once more for that state's step.

    Raises:
        ValueError: there is nothing to read.
        TrainingDiverged: the loss is not a number any more.
    """
    stream = _Stream(
        _mixed_batches(
            _texts(tokenizer, rows, max_length=max_length, packed=packed, running=False),
            _texts(tokenizer, documents, max_length=max_length, packed=packed, running=True),
            document_share=document_share,
            batch_size=batch_size,
            prompt_weight=prompt_weight,
            seed=seed,
        )
    )
    reading = _Reading(
        model,
        stream,
        precision=precision,
        micro_batch_size=micro_batch_size,
        measure_every=measure_every if on_measure else 0,
        on_measure=on_measure or (lambda *_: None),
    )
    model.train()
    with isolated_generators(derive_seed(seed, "generators"), model.device):
        learner = Learner(list(model.parameters()), learning_rate, weight_decay, betas=_BETAS)
        report = train(
            {"model": learner},
            reading.step,
            steps=steps,
            stage=STAGE,
            on_progress=lambda _, done, of, losses: on_progress(done, of, losses["loss"]),
            schedule=schedule,
            checkpoints=checkpoints,
        )
        reading.measure(steps)
    model.eval()
    stream.advance(steps)
    return Pretrained(report["loss"], stream.num_tokens)


def _texts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[TrainingText], *, max_length: int, packed: bool, running: bool
) -> SimilarLengths | Windows:
    if not packed:
        return SimilarLengths(tokenizer, texts, max_length=max_length, cut_up=running)
    if running:
        return Windows.of_documents(tokenizer, (each.text for each in texts), length=max_length)
    return Windows.of_rows(tokenizer, texts, length=max_length)


def _mixed_batches(
    rows: SimilarLengths | Windows,
    documents: SimilarLengths | Windows,
    *,
    document_share: float,
    batch_size: int,
    prompt_weight: float,
    seed: int,
) -> Iterator[Batch]:
    if not (len(rows) or len(documents)):
        raise ValueError("expected text to pretrain on, got no row and no document of two tokens or more")
    order = random.Random(seed)
    of_rows = rows.batches(batch_size, prompt_weight, random.Random(order.random()))
    of_documents = documents.batches(batch_size, prompt_weight, random.Random(order.random()))
    while True:
        running = len(documents) and (not len(rows) or order.random() < document_share)
        yield next(of_documents if running else of_rows)


class _Stream:
    """Batches by step, of steps that never go back. To go on at a step is to pass over those before it."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._position = 0
        self.num_tokens = 0

    def at(self, step: int) -> Batch:
        self.advance(step)
        return self._next()

    def advance(self, step: int) -> None:
        while self._position < step:
            self._next()

    def _next(self) -> Batch:
        batch = next(self._batches)
        self._position += 1
        self.num_tokens += batch.num_tokens
        return batch


class _Reading:
    """The micro-batches of each step, and what is measured between steps."""

    def __init__(
        self,
        model: PreTrainedModel,
        stream: _Stream,
        *,
        precision: Precision,
        micro_batch_size: int | None,
        measure_every: int,
        on_measure: Callable[[int, int], None],
    ) -> None:
        self._model, self._stream = model, stream
        self._precision, self._micro_batch_size = precision, micro_batch_size
        self._measure_every, self._on_measure = measure_every, on_measure

    def measure(self, step: int) -> None:
        """After so many steps; the model is in evaluation mode meanwhile."""
        if self._measure_every:
            self._stream.advance(step)
            self._model.eval()
            self._on_measure(step, self._stream.num_tokens)
            self._model.train()

    def step(self, step: int) -> Iterator[Step]:
        """As `training.train` asks for it: the step before is done."""
        if step and self._measure_every and step % self._measure_every == 0:
            self.measure(step)
        batch = self._stream.at(step)
        total = float(batch.weights_BT[:, 1:].flatten().sum())
        for ids_BT, weights_BT in _parts(batch, self._micro_batch_size):
            loss = weighted_loss(self._model, ids_BT, weights_BT, self._precision) / total
            yield Step({"model": loss}, {"loss": loss.detach()})


def _parts(batch: Batch, size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(batch.ids_BT), size or len(batch.ids_BT)):
        rows = slice(start, start + size if size else None)
        yield batch.ids_BT[rows], batch.weights_BT[rows]


def weighted_loss(model: PreTrainedModel, ids_BT: Tensor, weights_BT: Tensor, precision: Precision) -> Tensor:
    """Weighted sum of the cross-entropies of all tokens but each row's first, nats.

    Padding is on the right, where a causal model never looks at it: so the attention mask is all ones, which lets
    attention run without one.
    """
    ids_BT, weights_BT = ids_BT.to(model.device), weights_BT.to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        logits_BTV = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights_BT[:, 1:].flatten()).sum()


@torch.no_grad()
def text_bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    *,
    length: int,
    batch_size: int,
    precision: Precision,
) -> float:
    """Bits that the model needs for the documents and their ends, over their UTF-8 bytes; read in windows of `length`
    tokens, so that a token has at most that much before it."""
    end = torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)
    stream = torch.cat([end, token_stream(tokenizer, documents)]).long()
    starts = range(0, len(stream) - 1, length - 1)
    nats = 0.0
    for first in range(0, len(starts), batch_size):
        windows = [stream[start : start + length] for start in starts[first : first + batch_size]]
        ids_BT = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=int(tokenizer.pad_token_id))
        sizes_B1 = torch.tensor([[len(window)] for window in windows])
        weights_BT = (torch.arange(ids_BT.shape[1]) < sizes_B1).float()
        nats += float(weighted_loss(model, ids_BT, weights_BT, precision))
    return nats / math.log(2) / max(1, sum(len(each.encode()) for each in documents))


def response_bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Example],
    *,
    max_length: int,
    precision: Precision,
) -> float:
    """`evaluation.bits_per_byte` of the rows' responses."""
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        return bits_per_byte(LanguageModel.of(model, tokenizer), rows, batch_size=16, max_length=max_length)
