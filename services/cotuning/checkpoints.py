"""The whole state of a training loop between two steps, so that a killed training goes on as if nothing had happened.

What a step depends on: the learners' parameters, their optimizers' moments, the torch generators that dropout draws
from, and the number of steps taken. The order of the data is a pure function of a seed, so the step is its position.
Only values are here; keeping them is left to whoever implements `Checkpoints`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingState:
    """The state after `step` steps.

    Attributes:
        step: steps taken.
        tensors: by name: parameters, optimizer state and generator states. They may share memory with the training:
            write them before the next step.
        reported: what the last tenth of the steps has reported so far.
    """

    step: int
    tensors: Mapping[str, Tensor]
    reported: Mapping[str, list[float]]


class Checkpoints(Protocol):
    """Keeps the newest state of each stage of one training."""

    def due(self, step: int, steps: int) -> bool:
        """Whether the state after `step` of `steps` steps is to be kept."""
        ...

    def read(self, stage: str, fingerprint: str) -> TrainingState | None:
        """The kept state of a stage; None if there is none, or only one of a training with another fingerprint."""
        ...

    def write(self, stage: str, fingerprint: str, state: TrainingState) -> None:
        """Keep a state in the place of the stage's last one, durably."""
        ...


Optimizers = Mapping[str, torch.optim.Optimizer]


def fingerprint(settings: Mapping[str, object], optimizers: Optimizers) -> str:
    """SHA-256, hex, of what a stage starts from: its settings, the optimizers' and every parameter's initial value.

    Args:
        settings: as JSON.
        optimizers: with parameters as they are before the first step.
    """
    digest = hashlib.sha256(json.dumps([settings, torch.__version__], sort_keys=True).encode())
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            options = {key: value for key, value in group.items() if key not in ("params", "lr")}
            digest.update(json.dumps([name, options], sort_keys=True).encode())
            for tensor in group["params"]:
                digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def capture(optimizers: Optimizers) -> dict[str, Tensor]:
    """Everything that a next step depends on, by name."""
    tensors = {f"generator.{device}": state for device, state in _generator_states(optimizers).items()}
    for name, optimizer in optimizers.items():
        for index, tensor in enumerate(_parameters(optimizer)):
            tensors[f"parameter.{name}.{index}"] = tensor.detach()
        for index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                tensors[f"optimizer.{name}.{index}.{key}"] = value
    return tensors


def restore(optimizers: Optimizers, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `capture` gave, in place; the generators too.

    Raises:
        ValueError: the tensors are not those of these optimizers; nothing was changed.
    """
    moments: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in optimizers}
    values: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            name, index, entry = rest.rsplit(".", 2)
            moments[name].setdefault(int(index), {})[entry] = tensor
        elif kind == "parameter":
            values[rest] = tensor
    own = {
        f"{name}.{index}": tensor
        for name, optimizer in optimizers.items()
        for index, tensor in enumerate(_parameters(optimizer))
    }
    shapes = {key: list(tensor.shape) for key, tensor in own.items()}
    if shapes != (kept := {key: list(tensor.shape) for key, tensor in values.items()}):
        raise ValueError(f"expected a checkpoint of parameters {shapes}, got {kept}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(values[key])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments[name]})
    _set_generators({key.removeprefix("generator."): state for key, state in tensors.items() if key[:9] == "generator"})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _generator_states(optimizers: Optimizers) -> dict[str, Tensor]:
    """torch's global generators, which dropout draws from: the CPU's, and that of every GPU with parameters."""
    states = {"cpu": torch.get_rng_state()}
    for optimizer in optimizers.values():
        for device in {tensor.device for tensor in _parameters(optimizer) if tensor.device.type == "cuda"}:
            states[str(device)] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states: Mapping[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
