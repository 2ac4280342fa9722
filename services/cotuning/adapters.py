"""Low-rank adapters (LoRA, arXiv 2106.09685) as peft makes them, put on and taken off a model, by name.

A model is lent with adapters on and given back as it came: `adapted` is a context. What an adapter *is*, between two
uses, is a plain mapping from peft's tensor names (without the adapter's name, as in `adapter_model.safetensors`) to
float32 tensors on the CPU.

The proxy carries two at once, `shared` (theta, crosses the network) and `domain` (phi_i, never leaves the device): both
take part in the forward pass, their outputs add up, and which of them learns is set by hand, because peft would let
every active adapter learn.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from cotuning.language_model import LanguageModel
from cotuning.seeding import isolated_generators

AdapterState = dict[str, Tensor]
_SHOWN = 5


class AdapterMismatch(ValueError):
    """Tensors that do not belong to this model's adapter.

    Attributes:
        expected, received: names or shapes, shortened.
    """

    def __init__(self, detail: str, expected: Any, received: Any) -> None:
        super().__init__(f"{detail}: expected {expected}, got {received}")
        self.expected = expected
        self.received = received


def lora_config(
    lm: LanguageModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Literal["all-linear"] | Sequence[str] = "all-linear",
) -> LoraConfig:
    """A peft config for `lm`, with everything peft would guess from the model spelled out.

    Args:
        lm: the model it is for, without adapters.
        rank: r.
        alpha: the update is scaled by alpha / r.
        dropout: on the adapter's input, in training.
        target_modules: names of linear layers, or all of them but the head.
    """
    linear = {name.rpartition(".")[2]: module for name, module in _linear_layers(lm)}
    names = sorted(linear) if target_modules == "all-linear" else list(target_modules)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=any(isinstance(linear.get(name), Conv1D) for name in names),
        bias="none",
        task_type="CAUSAL_LM",
    )


def attach_adapter(lm: LanguageModel, name: str, config: LoraConfig, *, seed: int) -> LanguageModel:
    """Put a fresh adapter on: its output is zero until it is trained or loaded.

    Args:
        lm: changed in place; use the returned one.
        name: no dots.
        config: from `lora_config`.
        seed: of A's initial values; B starts at zero.
    """
    if "." in name:
        raise ValueError(f"expected an adapter name without dots, got {name!r}")
    with isolated_generators(seed):
        if hasattr(lm.model, "peft_config"):
            lm.model.add_adapter(name, copy.deepcopy(config))
            return lm
        return lm.with_model(get_peft_model(lm.model, copy.deepcopy(config), adapter_name=name))


def activate(lm: LanguageModel, names: Sequence[str], *, trainable: Collection[str] = ()) -> None:
    """Let exactly `names` take part in the forward pass, and exactly `trainable` of them learn.

    Raises:
        ValueError: an unknown name, or a trainable adapter that is not active.
    """
    known = set(lm.model.peft_config)
    if not set(names) <= known or not set(trainable) <= set(names):
        raise ValueError(
            f"expected names among {sorted(known)}, trainable ones among the active; got {names}, {trainable}"
        )
    if names:
        lm.model.base_model.enable_adapter_layers()
        lm.model.base_model.set_adapter(list(names))
    else:
        lm.model.base_model.disable_adapter_layers()
    for name in known:
        for tensor in adapter_parameters(lm, name).values():
            tensor.requires_grad_(name in trainable)


def adapter_parameters(lm: LanguageModel, name: str) -> dict[str, torch.nn.Parameter]:
    """The adapter's own parameters by peft's name without the adapter's, sorted."""
    found = {
        key.replace(f".{name}.", ".", 1): tensor
        for key, tensor in lm.model.named_parameters()
        if ".lora_" in key and f".{name}." in key
    }
    return dict(sorted(found.items()))


def adapter_state(lm: LanguageModel, name: str) -> AdapterState:
    """A copy of the adapter: float32, CPU, names as in `adapter_model.safetensors`."""
    parameters = adapter_parameters(lm, name)
    return {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in parameters.items()}


def load_adapter_state(lm: LanguageModel, name: str, state: Mapping[str, Tensor]) -> None:
    """Overwrite the adapter's values. Nothing is changed if the tensors are not exactly its own.

    Raises:
        AdapterMismatch: other names or shapes.
    """
    parameters = adapter_parameters(lm, name)
    require_same_tensors(f"adapter {name!r}", parameters, state)
    with torch.no_grad():
        for key, tensor in parameters.items():
            tensor.copy_(state[key])


@contextmanager
def adapted(
    lm: LanguageModel, config: LoraConfig, adapters: Mapping[str, Mapping[str, Tensor] | int]
) -> Iterator[LanguageModel]:
    """Lend `lm` with `adapters` on and active, none of them learning; take them off at the end, whatever happens.

    Args:
        lm: without adapters.
        config: from `lora_config`, for all of them.
        adapters: name -> its state, or the seed of a fresh one.
    """
    learned = [(tensor, tensor.requires_grad) for tensor in lm.model.parameters()]
    training = lm.model.training
    lent = lm
    try:
        for name, source in adapters.items():
            lent = attach_adapter(lent, name, config, seed=source if isinstance(source, int) else 0)
            if not isinstance(source, int):
                load_adapter_state(lent, name, source)
        if adapters:
            activate(lent, list(adapters))
        lent.model.eval()
        yield lent
    finally:
        if lent is not lm:
            lent.model.unload()
        for tensor, flag in learned:
            tensor.requires_grad_(flag)
        lm.model.train(training)


def fresh_adapter(lm: LanguageModel, config: LoraConfig, *, seed: int) -> AdapterState:
    """The state of an untrained adapter: what a run starts from."""
    with adapted(lm, config, {"fresh": seed}) as lent:
        return adapter_state(lent, "fresh")


def subtract(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> AdapterState:
    """`after - before`, tensor by tensor: a delta."""
    require_same_tensors("delta", before, after)
    return {name: after[name] - before[name] for name in before}


def add(state: Mapping[str, Tensor], delta: Mapping[str, Tensor], *, scale: float = 1.0) -> AdapterState:
    """`state + scale * delta`, tensor by tensor."""
    require_same_tensors("delta", state, delta)
    return {name: state[name] + scale * delta[name] for name in state}


def require_same_tensors(what: str, expected: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> None:
    """Raises `AdapterMismatch` unless both hold the same names with the same shapes."""
    missing, unknown = sorted(expected.keys() - received.keys()), sorted(received.keys() - expected.keys())
    if missing or unknown:
        raise AdapterMismatch(f"{what}: wrong tensor names", _shorten(missing or list(expected)), _shorten(unknown))
    for name, tensor in expected.items():
        if tensor.shape != received[name].shape:
            raise AdapterMismatch(f"{what}: shape of {name}", list(tensor.shape), list(received[name].shape))


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "nothing"


def _linear_layers(lm: LanguageModel) -> Iterator[tuple[str, Any]]:
    """Every linear layer but the head."""
    head = lm.base.get_output_embeddings()
    for name, module in lm.base.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            yield name, module
