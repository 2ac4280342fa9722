"""How much memory a training step will need, from a model's config alone, before anything is loaded.

The model is built of fake tensors (shapes without storage), given its adapter, and taken through one step at the
batch's size; what comes to life and dies on the way is counted, each storage once. So the number follows the
architecture, the attention kernel and the precision, with no formula for any family. What is not counted: the
allocator's fragmentation, and what kernels and libraries need inside.

Names: B rows, T tokens, V token ids, D hidden size.
"""

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from cotuning.adapters import activate, attach_adapter, lora_config
from cotuning.cross_entropy import DEFAULT_CHUNK_ROWS
from cotuning.examples import Example, render_prompt
from cotuning.gradient_checkpointing import recomputed_layers
from cotuning.language_model import LanguageModel, decoder_layers, hidden_states
from cotuning.proxy_creation import first_layers
from cotuning.training import Precision

Learns = Literal["everything", "adapter", "nothing"]

FOUR_BIT_BYTES = 0.5 + 1 / 64
"""A weight in 4 bits, with one 8-bit scale for each block of 64 (QLoRA, arXiv 2305.14314)."""

_CHUNK_COPIES = 3
"""Of a chunk of rows in `cross_entropy`: log-probabilities, slopes, and what either is made from; float32."""

_FEW_LAYERS = 3
"""More layers than these are not run: what the third one adds to two, each further one does."""

_ROWS_TRIED = 32

_MOMENTS = 2
"""AdamW's, each of its parameter's size."""


class CannotEstimate(ValueError):
    """The model does something that depends on values, and there are none."""


class NotEnoughMemory(ValueError):
    """A training step is expected to need more memory than there is.

    Attributes:
        place: device, for example `cpu`.
        expected_bytes, available_bytes: on it.
    """

    def __init__(self, place: str, expected_bytes: int, available_bytes: int, parts: str) -> None:
        super().__init__(
            f"not enough memory on {place}: expected to need {_readable(expected_bytes)} ({expected_bytes} bytes: "
            f"{parts}), {_readable(available_bytes)} ({available_bytes} bytes) are available; smaller batches, shorter "
            "rows, gradient checkpointing, bfloat16 or 4-bit weights need less"
        )
        self.place = place
        self.expected_bytes = expected_bytes
        self.available_bytes = available_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of one training step of one model.

    Attributes:
        weights: of the base and its adapters.
        gradients: of what learns.
        optimizer: AdamW's moments.
        activations: what the forward pass keeps for the backward pass.
        working: what is alive for a moment only: a layer's intermediate results, or chunks of logits with the head's
            gradient, whichever is more.
        layers: number of decoder layers.
        layer_share: share of weights, gradients, optimizer and activations that lies in the layers, in [0, 1].
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    layers: int
    layer_share: float

    @property
    def total(self) -> int:
        """All of it, on one device."""
        return self.kept_on_fullest_of(1) + self.working

    def kept_on_fullest_of(self, devices: int) -> int:
        """All but `working` on the first of so many devices, if layers are dealt evenly and it has all the rest too."""
        kept = self.weights + self.gradients + self.optimizer + self.activations
        dealt = math.ceil(self.layers / devices) / self.layers
        return math.ceil(kept * (1 - self.layer_share * (1 - dealt)))

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("weights", "gradients", "optimizer", "activations", "working")}
        return f"{_readable(self.total)}, mostly {max(parts, key=lambda name: parts[name])}"


def estimate_memory(
    config: Any,
    *,
    learns: Learns,
    rank: int = 8,
    adapters: int = 1,
    batch_size: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    four_bit: bool = False,
    precision: Precision = "float32",
    gradient_checkpointing: bool = False,
) -> MemoryEstimate:
    """Estimate one model's share of a training step.

    Args:
        config: a transformers config.
        learns: `nothing` is a model that is only read, without gradients.
        rank: of LoRA adapters on all linear layers, if one learns.
        adapters: how many of them are on; one of them learns.
        batch_size: B.
        length: T.
        dtype: of the base's weights.
        four_bit: linear layers but the head in 4 bits.
        precision: of the forward pass.
        gradient_checkpointing: see there.

    Raises:
        CannotEstimate: the architecture cannot be run without values, or has no list of decoder layers.
    """
    total = config.num_hidden_layers
    parts = learns, rank, adapters, dtype
    try:
        few = [
            _fake_step(_on_meta(each, *parts), (batch_size, length), precision, gradient_checkpointing)
            for each in ([config] if total <= _FEW_LAYERS else map(partial(first_layers, config), (2, 3)))
        ]
    except (RuntimeError, ValueError) as error:
        raise CannotEstimate(f"{config.model_type}: expected a model that runs on shapes alone: {error}") from error
    seen = few[0] if len(few) == 1 else few[0].grown(few[1], total - 2)
    return _add_up(_on_meta(config, *parts), seen, (batch_size, length), learns=learns, four_bit=four_bit)


def _on_meta(config: Any, learns: Learns, rank: int, adapters: int, dtype: torch.dtype) -> LanguageModel:
    """The model with its adapters and what learns of it, without storage."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        # No tokenizer: only ids are read here, and adapters do not ask for it.
        lm = LanguageModel(base, None, None)  # type: ignore[arg-type]
        if learns == "adapter":
            lora = lora_config(lm, rank=rank, alpha=1.0)
            for index in range(adapters):
                lm = attach_adapter(lm, f"adapter{index}", lora, seed=0)
            activate(lm, [f"adapter{index}" for index in range(adapters)], trainable=["adapter0"])
        else:
            base.requires_grad_(learns == "everything")
    return lm


@dataclass(frozen=True)
class _Seen:
    """Bytes of a fake step: alive after the forward pass, and at the worst moment; without weights and gradients."""

    kept: int
    peak: int

    def grown(self, next_layer: "_Seen", layers: int) -> "_Seen":
        """What so many more layers make of it, each as the one that `next_layer` has more."""
        kept = self.kept + layers * (next_layer.kept - self.kept)
        return _Seen(kept, kept + max(self.peak - self.kept, next_layer.peak - next_layer.kept))


def _fake_step(lm: LanguageModel, ids_shape: tuple[int, int], precision: Precision, checkpointing: bool) -> _Seen:
    """Forward and, if something learns, backward through the decoder. Changes `lm` for good."""
    learns = any(tensor.requires_grad for tensor in lm.model.parameters())
    # Fake tensors on the CPU and not those of "meta": only they choose the attention kernel that the CPU does.
    with FakeTensorMode():
        live = _LiveBytes(_become_fake(lm.model))
        with live, torch.set_grad_enabled(learns), recomputed_layers(lm, enabled=checkpointing):
            ids_BT = torch.zeros(ids_shape, dtype=torch.int64)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                hidden_BTD = hidden_states(lm, ids_BT)
            kept = live.now
            if learns:
                hidden_BTD.sum().backward()  # type: ignore[no-untyped-call]
    return _Seen(kept, live.peak)


def _become_fake(model: torch.nn.Module) -> list[Tensor]:
    """Replace every tensor by one without storage that claims to be on the CPU, with gradients where they will be.

    Inside `FakeTensorMode`. Returns all of them.
    """
    made: dict[int, Tensor] = {}  # tied weights stay tied
    gradients: list[Tensor] = []
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if id(tensor) not in made:
                fake = torch.nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), tensor.requires_grad)
                if fake.requires_grad:
                    fake.grad = torch.empty_like(fake)
                    gradients.append(fake.grad)
                made[id(tensor)] = fake
            module.register_parameter(name, made[id(tensor)])  # type: ignore[arg-type]
        for name, buffer in list(module.named_buffers(recurse=False)):
            made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
            module.register_buffer(name, made[id(buffer)], persistent=False)
    return [*made.values(), *gradients]


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, counts the bytes of tensors made here and still alive, and the most there have been at once.

    Args:
        others: tensors that were there before.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in others:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._meet, result)
        return result

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = True
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._lose, size)

    def _lose(self, size: int) -> None:
        self.now -= size


def longest_row(tokenizer: Any, examples: Sequence[Example], *, max_length: int) -> int:
    """Tokens of the longest of the rows, cut to `max_length`: T of the largest batch.

    Only the rows with most characters are tokenized.
    """
    longest = sorted(examples, key=lambda row: len(row.instruction) + len(row.input) + len(row.output))[-_ROWS_TRIED:]
    texts = [render_prompt(tokenizer, row) + row.output for row in longest]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]] if texts else [0]
    return min(max_length, max(lengths) + 1)  # END


def together(estimates: Iterable[MemoryEstimate], *, devices: int = 1) -> int:
    """Bytes on the fullest device of a step in which all these models take part.

    What each keeps adds up; what is alive for a moment only does not, as they run one after the other.
    """
    every = list(estimates)
    return sum(each.kept_on_fullest_of(devices) for each in every) + max((each.working for each in every), default=0)


def require_memory(estimates: Mapping[str, MemoryEstimate], available: Mapping[str, int]) -> None:
    """Refuse a training that cannot fit.

    Args:
        estimates: of each model that takes part in a step, by its name.
        available: bytes of each device over which the layers are dealt, the first one's first.

    Raises:
        NotEnoughMemory: the first device, which has most, has too little.
    """
    place, bytes_there = next(iter(available.items()))
    needed = together(estimates.values(), devices=len(available))
    if needed > bytes_there:
        raise NotEnoughMemory(
            place, needed, bytes_there, "; ".join(f"{name} {each}" for name, each in estimates.items())
        )


def _add_up(
    lm: LanguageModel, seen: _Seen, ids_shape: tuple[int, int], *, learns: Learns, four_bit: bool
) -> MemoryEstimate:
    """Put together what the decoder was seen to need and what the heads and the optimizer will."""
    in_layers, outside = _Tally(), _Tally()
    layers = lm.base.config.num_hidden_layers
    path = decoder_layers(lm.base, layers)
    head = lm.base.get_output_embeddings().weight
    embeddings = lm.base.get_input_embeddings().weight
    for name, tensor in lm.base.named_parameters():
        small = four_bit and tensor.dim() == 2 and tensor is not head and tensor is not embeddings
        tally = in_layers if name.startswith(f"{path}.") else outside
        tally.add(tensor, FOUR_BIT_BYTES if small and ".lora_" not in name else None)
    # Hidden states at the positions that a loss reads and their gradients, and chunks of rows times vocabulary.
    tokens = ids_shape[0] * ids_shape[1]
    heads = 3 * tokens * head.shape[1] * 4 + min(DEFAULT_CHUNK_ROWS, tokens) * head.shape[0] * 4 * _CHUNK_COPIES
    if learns == "everything":
        heads += 2 * head.numel() * 4  # one from cross-entropy and one from the divergence, before they are added
    activations = seen.kept if learns != "nothing" else 0
    dealt = in_layers.total + activations
    return MemoryEstimate(
        weights=in_layers.weights + outside.weights,
        gradients=in_layers.learned + outside.learned,
        optimizer=_MOMENTS * (in_layers.learned + outside.learned),
        activations=activations,
        working=max(seen.peak - activations, heads),
        layers=layers,
        layer_share=dealt / (dealt + outside.total),
    )


@dataclass
class _Tally:
    """Bytes of weights, and of those that learn."""

    weights: int = 0
    learned: int = 0

    def add(self, tensor: Tensor, bytes_each: float | None) -> None:
        self.weights += math.ceil(tensor.numel() * (bytes_each or tensor.element_size()))
        self.learned += tensor.numel() * tensor.element_size() if tensor.requires_grad else 0

    @property
    def total(self) -> int:
        """With gradients and moments."""
        return self.weights + (1 + _MOMENTS) * self.learned


def _readable(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
