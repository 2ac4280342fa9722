"""Two random models that read the same text with different tokenizers, and the steps that are compared on them.

Names: B rows, T tokens, V token ids.

Vocabularies are widened to any size: ids that the text never shows are spread over the classes of the fold. So the
products with the heads have the size of a real vocabulary, and text and spans are real.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.corpus import held_out, tokenizer
from cotuning.adapters import activate, attach_adapter, lora_config
from cotuning.encoding import EncodedBatch, encode_batch
from cotuning.folding import FoldPair, fold_pair
from cotuning.heads import Head
from cotuning.language_model import LanguageModel, hidden_states
from cotuning.matching.choose import choose_matching
from cotuning.matching.interface import Matching, Reading
from cotuning.token_tables import TokenTable, token_table

_PASSAGE_TOKENS = 512
"""No tokenizer of the corpus makes fewer of a passage of 2,500 characters, by a good margin."""


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, as Llama names them."""

    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    tied: bool = False

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """`hidden,layers,heads,key_value_heads,intermediate`, and `,tied` for a head that is the embedding."""
        parts = text.split(",")
        numbers = parts[:5]
        if len(numbers) != 5 or not all(number.isdecimal() for number in numbers) or parts[5:] not in ([], ["tied"]):
            raise ValueError(f"expected hidden,layers,heads,key_value_heads,intermediate[,tied], got {text!r}")
        return cls(*(int(number) for number in numbers), tied=len(parts) == 6)


def random_model(shape: Shape, vocabulary: int, *, dtype: torch.dtype, device: torch.device | str) -> LlamaForCausalLM:
    """A Llama of that shape, made where it will be."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        dtype=dtype,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # or a model of 8 billion parameters would first be made in float32
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True)
class Reader:
    """One model of a pair with what it reads.

    Attributes:
        lm: all of it trained, or with an adapter that alone is.
        batch: the text in its tokenizer's ids.
        vocabulary: V, the widened one.
    """

    lm: LanguageModel
    batch: EncodedBatch
    vocabulary: int

    def reading(self) -> Reading:
        """One forward pass, as SAML makes it."""
        layer = self.lm.base.get_output_embeddings()
        head = Head(layer.weight, self.vocabulary)
        return Reading(self.batch, hidden_states(self.lm, self.batch.input_ids_BT), head, joint_weight=1.0)

    def trained(self) -> list[Tensor]:
        """The parameters that learn."""
        return [parameter for parameter in self.lm.model.parameters() if parameter.requires_grad]

    def forget_gradients(self) -> None:
        """As an optimizer does after its step."""
        for parameter in self.trained():
            parameter.grad = None


def texts(rows: int, length: int) -> list[str]:
    """Text for `rows` rows, each of at least `length` tokens."""
    each = -(-length // _PASSAGE_TOKENS)
    passages = held_out(rows * each)
    return ["".join(passages[row * each : (row + 1) * each]) for row in range(rows)]


def reader(
    kind: str,
    shape: Shape,
    vocabulary: int | None,
    *,
    rows: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    lora_rank: int | None = None,
) -> Reader:
    """A random model that reads `rows` rows of `length` tokens.

    Args:
        kind: one of the corpus' tokenizers.
        shape: of the decoder.
        vocabulary: V, at least the tokenizer's; that of the tokenizer if not given.
        dtype: of the base.
        device: of everything.
        lora_rank: of an adapter on every linear layer but the head, all else frozen; all is trained if not given.
    """
    table = token_table(tokenizer(kind))
    vocabulary = vocabulary or table.num_tokens
    model = random_model(shape, vocabulary, dtype=dtype, device=device)
    lm = LanguageModel(model, tokenizer(kind), table)
    if lora_rank is not None:
        model.requires_grad_(False)
        lm = attach_adapter(lm, "learnt", lora_config(lm, rank=lora_rank, alpha=2.0 * lora_rank), seed=0)
        activate(lm, ["learnt"], trainable=["learnt"])
    prompts = ["Continue:\n"] * rows
    batch = encode_batch(tokenizer(kind), table, prompts, texts(rows, length), max_length=length)
    return Reader(lm, batch.to(device), vocabulary)


def fold_of(a: Reader, b: Reader) -> FoldPair:
    """The fold of two readers' vocabularies, on their device."""
    fold = fold_pair(a.lm.tokenizer, a.lm.table, b.lm.tokenizer, b.lm.table)
    return widened(fold, (a.lm.table, b.lm.table), (a.vocabulary, b.vocabulary)).to(a.lm.device)


def widened(fold: FoldPair, tables: Sequence[TokenTable], sizes: Sequence[int]) -> FoldPair:
    """The same classes, over more ids: those never seen are spread evenly over them."""
    if fold.identical:
        if sizes[0] != sizes[1]:
            raise ValueError(f"expected one vocabulary for equal tokenizers, got {sizes[0]} and {sizes[1]}")
        ids = torch.arange(sizes[0])
        return FoldPair(ids, ids, sizes[0], fold.end_class, fold.other_class, sizes[0], True, "widened")
    maps = [
        torch.cat([map_V, torch.arange(size - table.num_tokens) % fold.num_classes])
        for table, map_V, size in zip(tables, (fold.map_a_V, fold.map_b_V), sizes, strict=True)
    ]
    return FoldPair(maps[0], maps[1], fold.num_classes, fold.end_class, fold.other_class, 0, False, "widened")


def fold_matching(a: Reader, b: Reader) -> Matching:
    """What SAML compares by default."""
    return choose_matching("fold", a.lm.table, b.lm.table, fold_of(a, b))


def bare_step(readers: Sequence[Reader]) -> None:
    """Each model's forward, its own cross-entropy, backward; as a trainer runs it."""
    for each in readers:
        each.forget_gradients()
        each.lm.model(input_ids=each.batch.input_ids_BT, labels=each.batch.labels_BT, use_cache=False).loss.backward()


def saml_step(readers: Sequence[Reader], match: Matching) -> None:
    """Both forwards, alignment, both cross-entropies, both directions of the folded loss, backward."""
    for each in readers:
        each.forget_gradients()
    lessons = match(*(each.reading() for each in readers))
    losses = [lesson.joint for lesson in lessons if lesson.joint is not None]
    assert len(losses) == len(readers)
    torch.stack(losses).sum().backward()


def step_operations(readers: Sequence[Reader]) -> float:
    """Floating-point operations of a bare step's matrix products with weights.

    Two a weight and token forward, two for what the weight was applied to, and two for the weight's own gradient where
    it learns: frozen weights cost four, not six. The head counts at every position. Attention between tokens,
    normalisation and softmax are left out.
    """
    total = 0.0
    for each in readers:
        tokens = each.batch.input_ids_BT.numel()
        for module in each.lm.model.modules():
            if isinstance(module, nn.Linear):
                total += (4 + 2 * module.weight.requires_grad) * module.weight.numel() * tokens
    return total


def described(each: Reader) -> dict[str, Any]:
    """What a result says of a reader."""
    return {
        "parameters": each.lm.num_parameters,
        "trained_parameters": sum(parameter.numel() for parameter in each.trained()),
        "vocabulary": each.vocabulary,
        "rows": len(each.batch.input_ids_BT),
        "tokens": int(each.batch.attention_mask_BT.sum()),
    }
