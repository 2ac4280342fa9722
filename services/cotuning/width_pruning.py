"""Which attention heads and feed-forward neurons of a decoder matter, measured on rows, and cutting the others out.

Importance as in Minitron (arXiv 2407.14679, section 2.2), forward passes only: of a head h, the L2 norm of its output
before the output projection, `mean_t |o_h(t)|_2`; of a neuron n, its activation, `mean_t |a_n(t)|`. Theirs tries
several ways to aggregate over sequence and batch; here it is the mean of absolute values over the response tokens of
all rows, so that padding and prompts do not count. Heads that share a key and value (grouped-query attention) stay or
go together.

What belongs to what is read from shapes, not from a list of families: in each layer the last linear layer of the
attention part that reads all heads, and the last one of the rest that reads all neurons.

Names: B rows, T tokens, N response tokens of a batch, H heads, G groups of heads, F neurons.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from cotuning.cross_entropy import response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel, decoder_layers, hidden_states

_MEASURED_AT_ONCE = 16
_NEURON_FIELDS = ("intermediate_size", "ffn_dim", "n_inner")


@dataclass(frozen=True)
class LayerWidths:
    """What is kept of one layer: indices, ascending.

    Attributes:
        query_rows: of the query projection's outputs and the output projection's inputs.
        key_rows: of the key's and the value's projections' outputs.
        neurons: of the feed-forward part.
    """

    query_rows: Tensor
    key_rows: Tensor
    neurons: Tensor


@dataclass(frozen=True)
class Widths:
    """What is kept of every layer of the LLM, and of how much.

    Attributes:
        layers: one for each layer of the LLM.
        head_size: outputs of a head.
        old_heads, old_groups, old_neurons: of each layer of the LLM.
        heads, groups, neurons: what is left of them.
    """

    layers: Sequence[LayerWidths]
    head_size: int
    old_heads: int
    old_groups: int
    old_neurons: int
    heads: int
    groups: int
    neurons: int

    def kept(self, old: int, new: int, layer: LayerWidths, *, attention: bool) -> Tensor | None:
        """The indices that cut a dimension of a layer's weight from `old` to `new`; None if nothing known does."""
        size = self.head_size
        if attention:
            if (old, new) == (self.old_heads * size, self.heads * size):
                return layer.query_rows
            return layer.key_rows if (old, new) == (self.old_groups * size, self.groups * size) else None
        return layer.neurons if (old, new) == (self.old_neurons, self.neurons) else None


@dataclass(frozen=True)
class Importance:
    """Importance of the heads [H] and the neurons [F] of one layer, mean over response tokens."""

    heads_H: Tensor
    neurons_F: Tensor


def choose_widths(
    llm: LanguageModel, *, head_share: float, neuron_share: float, examples: Sequence[Example], max_length: int
) -> Widths | None:
    """What to keep of each layer; None if everything is.

    Raises:
        ValueError: a share outside (0, 1], or a share below 1 without examples.
    """
    for name, share in (("head_share", head_share), ("neuron_share", neuron_share)):
        if not 0 < share <= 1:
            raise ValueError(f"expected {name} above 0 and at most 1, got {share}")
    if head_share == neuron_share == 1:
        return None
    if not examples:
        raise ValueError("expected public rows to measure the importance of heads and neurons on, got none")
    config = llm.base.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    importance = measure_importance(llm, examples, max_length=max_length)
    size = _head_size(config)
    old_neurons = len(importance[0].neurons_F)
    new_groups, new_neurons = max(1, round(groups * head_share)), max(1, round(old_neurons * neuron_share))
    layers = []
    for layer in importance:
        groups_K = _most_important(layer.heads_H.view(groups, -1).sum(1), new_groups)
        layers.append(
            LayerWidths(
                query_rows=_rows(groups_K, size * heads // groups),
                key_rows=_rows(groups_K, size),
                neurons=_most_important(layer.neurons_F, new_neurons),
            )
        )
    new_heads = new_groups * heads // groups
    return Widths(layers, size, heads, groups, old_neurons, new_heads, new_groups, new_neurons)


@torch.no_grad()
def measure_importance(llm: LanguageModel, examples: Sequence[Example], *, max_length: int) -> list[Importance]:
    """The importance of every layer's heads and neurons on `examples`, float64, on the CPU.

    Raises:
        ValueError: an architecture in whose layers heads or neurons are not found.
    """
    config = llm.base.config
    heads, size = config.num_attention_heads, _head_size(config)
    layers = llm.base.get_submodule(decoder_layers(llm.base, config.num_hidden_layers))
    neurons = _num_neurons(layers[0], config)
    inputs = [
        (_reader(layer, heads * size, attention=True), _reader(layer, neurons, attention=False)) for layer in layers
    ]
    totals = [(torch.zeros(heads).double(), torch.zeros(neurons).double()) for _ in layers]
    rows = EncodedRows(llm, examples, max_length=max_length)
    num_tokens = 0
    for start in range(0, len(examples), _MEASURED_AT_ONCE):
        batch = rows.batch(range(start, min(start + _MEASURED_AT_ONCE, len(examples))))
        tokens = response_tokens(batch)
        num_tokens += len(tokens.sample_N)
        place = (tokens.sample_N, tokens.position_N)
        with _listening(inputs, totals, place, batch.input_ids_BT.shape, heads):
            hidden_states(llm, batch.input_ids_BT)
    return [Importance(heads_H / max(num_tokens, 1), neurons_F / max(num_tokens, 1)) for heads_H, neurons_F in totals]


@contextmanager
def _listening(
    inputs: Sequence[tuple[Any, Any]],
    totals: Sequence[tuple[Tensor, Tensor]],
    place: tuple[Tensor, Tensor],
    shape: torch.Size,
    heads: int,
) -> Iterator[None]:
    """Inside, what the given linear layers read at the response tokens is added to `totals`."""

    def listener(total: Tensor, measure: Callable[[Tensor], Tensor]) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def listen(_: Any, received: tuple[Tensor, ...]) -> None:
            # OPT's feed-forward layers read [B * T, F].
            values_BTX = received[0].view(*shape, -1)
            total.add_(measure(values_BTX[place].double()).sum(0).cpu())

        return listen

    handles = []
    for (out, down), (heads_H, neurons_F) in zip(inputs, totals, strict=True):
        norm_of_heads = listener(heads_H, lambda values_NX: values_NX.view(len(values_NX), heads, -1).norm(dim=2))
        handles.append(out.register_forward_pre_hook(norm_of_heads))
        handles.append(down.register_forward_pre_hook(listener(neurons_F, torch.abs)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def narrowed_config(config: Any, widths: Widths) -> Any:
    """A copy of `config` with fewer heads and neurons; the hidden size and a head's size stay."""
    changed = copy.deepcopy(config)
    if widths.heads != widths.old_heads:
        changed.num_attention_heads = widths.heads
        if getattr(config, "num_key_value_heads", None):
            changed.num_key_value_heads = widths.groups
        changed.head_dim = widths.head_size
    if widths.neurons != widths.old_neurons:
        names = [name for name in _NEURON_FIELDS if hasattr(config, name)]
        if not names:
            raise ValueError(f"{config.model_type}: expected a setting for the number of neurons, found none")
        setattr(changed, names[0], widths.neurons)
    return changed


def require_cut(model: Any, layers_path: str, widths: Widths) -> None:
    """Refuse an architecture that does not take these widths from its config.

    Raises:
        ValueError: it makes its heads larger instead of fewer, or its layers are not understood.
    """
    layer = model.get_submodule(layers_path)[0]
    for attention, size in ((True, widths.heads * widths.head_size), (False, widths.neurons)):
        try:
            _reader(layer, size, attention=attention)
        except ValueError as error:
            kind = "heads" if attention else "neurons"
            raise ValueError(f"{model.config.model_type}: expected a family whose {kind} can be cut; {error}") from None


def cut_layer(tensor: Tensor, shape: torch.Size, name: str, widths: Widths, layer: LayerWidths) -> Tensor:
    """One weight of a layer, cut to `shape`.

    Raises:
        ValueError: a dimension changes in a way that is not understood.
    """
    attention = _in_attention(name)
    for dimension, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
        if old == new:
            continue
        kept_K = widths.kept(old, new, layer, attention=attention)
        if kept_K is None:
            raise ValueError(f"{name}: expected heads or neurons to cut from {old} to {new}, found neither")
        tensor = tensor.index_select(dimension, kept_K.to(tensor.device))
    return tensor


def _most_important(values_X: Tensor, count: int) -> Tensor:
    """Indices of the `count` greatest, ascending; of equal ones the first."""
    return values_X.argsort(descending=True, stable=True)[:count].sort().values


def _rows(groups_K: Tensor, size: int) -> Tensor:
    return (groups_K[:, None] * size + torch.arange(size)).flatten()


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _num_neurons(layer: Any, config: Any) -> int:
    for name in _NEURON_FIELDS:
        size = getattr(config, name, None)
        if isinstance(size, int):
            return size
    widest = [_fan_in(module) for name, module in _linears(layer) if not _in_attention(name)]
    if not widest:
        raise ValueError(f"{config.model_type}: expected linear layers outside attention, found none")
    return max(widest)


def _reader(layer: Any, size: int, *, attention: bool) -> Any:
    """The last linear layer of the attention part, or of the rest, that reads `size` values."""
    found = [module for name, module in _linears(layer) if _in_attention(name) is attention and _fan_in(module) == size]
    if not found:
        part = "attention" if attention else "the feed-forward part"
        raise ValueError(f"expected a linear layer in {part} that reads {size} values, found none")
    return found[-1]


def _linears(layer: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear | Conv1D))


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".") if "norm" not in part)


def _fan_in(module: Any) -> int:
    return int(module.weight.shape[0] if isinstance(module, Conv1D) else module.weight.shape[1])
