"""Making a small model of the LLM's own kind: fewer layers, narrower ones, or a fresh start.

Depth: of L layers k are kept, evenly spread, at `round(j (L - 1) / (k - 1))`, first and last always among them (ours;
the ends of a decoder are the ones it cannot spare, arXiv 2403.03853). Width: whole attention heads and feed-forward
neurons, by their importance on public rows; see `width_pruning`. The result is then distilled; see `proxy`."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from transformers import AutoModelForCausalLM

from cotuning.examples import Example
from cotuning.language_model import LanguageModel, decoder_layers
from cotuning.seeding import isolated_generators
from cotuning.width_pruning import Widths, choose_widths, cut_layer, narrowed_config, require_cut


def create_proxy(
    llm: LanguageModel,
    *,
    source: Literal["prune", "config"],
    layers: int,
    hidden_size: int | None = None,
    head_share: float = 1.0,
    neuron_share: float = 1.0,
    examples: Sequence[Example] = (),
    max_length: int = 256,
    seed: int,
) -> LanguageModel:
    """A new model with the LLM's architecture and tokenizer, float32, on the CPU; the LLM is only read.

    Args:
        llm: without adapters.
        source: `prune` keeps every k-th layer of the LLM with its weights, and its embeddings and head; `config` makes
            a fresh model from the LLM's config.
        layers: kept or made.
        hidden_size: `config` only; default half of the LLM's.
        head_share: `prune` only; share of the attention heads that is kept, in (0, 1]; whole groups of heads that
            share a key and value.
        neuron_share: `prune` only; share of the feed-forward neurons that is kept, in (0, 1].
        examples: public rows on which importance is measured; needed if a share is below 1.
        max_length: tokens of such a row.
        seed: of fresh weights.

    Raises:
        ValueError: more layers than the LLM has, settings of the other source, shares without rows, or an architecture
            whose layers are not found or cannot be narrowed.
    """
    if source == "prune":
        if hidden_size is not None:
            raise ValueError(f"expected no hidden_size for source 'prune', got {hidden_size}")
        widths = choose_widths(
            llm, head_share=head_share, neuron_share=neuron_share, examples=examples, max_length=max_length
        )
        return _prune(llm, layers, widths, seed)
    if source == "config":
        if (head_share, neuron_share) != (1.0, 1.0):
            raise ValueError(f"expected no shares for source 'config', got {head_share} and {neuron_share}")
        config = _narrowed(llm.base.config, layers, hidden_size)
        return llm.with_model(_fresh_model(config, seed))
    raise ValueError(f"expected source 'prune' or 'config', got {source!r}")


def proxy_config(llm_config: Any, *, source: Literal["prune", "config"], layers: int, hidden_size: int | None) -> Any:
    """The config of the proxy that `create_proxy` would make with all heads and neurons kept, from the LLM's alone."""
    total = llm_config.num_hidden_layers
    if source == "prune":
        return _with_layers(llm_config, _spread(min(layers, total), total))
    return _narrowed(llm_config, layers, hidden_size)


def first_layers(config: Any, count: int) -> Any:
    """The config of a model with the first `count` layers only."""
    return _with_layers(config, range(count))


def _spread(layers: int, total: int) -> list[int]:
    """Evenly spread indices of layers, first and last among them."""
    return [round(place * (total - 1) / max(layers - 1, 1)) for place in range(layers)]


def _fresh_model(config: Any, seed: int) -> Any:
    with isolated_generators(seed):
        return AutoModelForCausalLM.from_config(config).float().eval()


def _prune(llm: LanguageModel, layers: int, widths: Widths | None, seed: int) -> LanguageModel:
    config = llm.base.config
    total = config.num_hidden_layers
    if not 1 <= layers <= total:
        raise ValueError(f"expected 1 to {total} layers, the LLM has no more; got {layers}")
    if getattr(llm.base, "is_quantized", False):
        raise ValueError("expected an LLM whose weights are not quantized for source 'prune', got a quantized one")
    path = decoder_layers(llm.base, total)
    kept = _spread(layers, total)
    smaller = _with_layers(config, kept)
    model = _fresh_model(narrowed_config(smaller, widths) if widths else smaller, seed)
    if widths:
        require_cut(model, path, widths)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for name, tensor in llm.base.state_dict().items():
        if not name.startswith(f"{path}."):
            state[name] = tensor
            continue
        index, _, rest = name.removeprefix(f"{path}.").partition(".")
        if int(index) in kept:
            target = f"{path}.{kept.index(int(index))}.{rest}"
            layer = widths.layers[int(index)] if widths else None
            state[target] = cut_layer(tensor, shapes[target], target, widths, layer) if widths and layer else tensor
    model.load_state_dict(state)
    return llm.with_model(model)


def _with_layers(config: Any, kept: Sequence[int]) -> Any:
    """The config of a model with only these layers; lists with one entry a layer (`layer_types`) are cut alike."""
    total = config.num_hidden_layers
    changed = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == total:
            setattr(changed, name, [value[index] for index in kept])
    changed.num_hidden_layers = len(kept)
    return changed


def _narrowed(config: Any, layers: int, hidden_size: int | None) -> Any:
    """The config of a smaller sibling: heads keep their size where they can, feed-forward layers their ratio."""
    total, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    narrow = hidden_size or width // 2
    changed = _with_layers(config, [min(total - 1, place * total // layers) for place in range(layers)])
    changed.hidden_size = narrow
    head_size = getattr(config, "head_dim", None) or width // heads
    new_heads = max(1, round(heads * narrow / width))
    if head_size * heads == width:  # else (Qwen 3) heads have a size of their own, and keep it
        while narrow % new_heads:
            new_heads -= 1
        if getattr(config, "head_dim", None):
            changed.head_dim = narrow // new_heads
    changed.num_attention_heads = new_heads
    groups = getattr(config, "num_key_value_heads", None)
    if groups:
        changed.num_key_value_heads = math.gcd(new_heads, max(1, groups * new_heads // heads))
    for name in ("intermediate_size", "ffn_dim", "n_inner", "word_embed_proj_dim"):
        size = getattr(config, name, None)
        if isinstance(size, int):
            setattr(changed, name, max(1, size * narrow // width))
    return changed
