"""Finds tensors made on the wrong device, on a machine that has only one.

Inside `PretendedCard` tensors count as being on a card if they were put there (`place`, `.to(device)`), were made with
a `device=`, or came of such tensors. An operation that mixes one with a tensor that was made without a device, and so
on the processor, is refused, as CUDA would: unless the latter has no dimensions, or only says which places of the
former are meant.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_MARK = "on_pretended_card"
_BACK = ("cpu", "numpy", "tolist", "item")
_PLACES = ("__getitem__", "__setitem__")


class WrongDevice(AssertionError):
    """An operation on tensors of both devices."""


def place(model: nn.Module) -> None:
    """Put a model's tensors on the card."""
    for tensor in (*model.parameters(), *model.buffers()):
        setattr(tensor, _MARK, True)


def on_card(tensor: Tensor) -> bool:
    return getattr(tensor, _MARK, False)


class PretendedCard(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        tensors = list(_tensors((args, kwargs)))
        there = any(on_card(tensor) for tensor in tensors)
        wrong = [tensor for tensor in tensors if tensor.dim() and not on_card(tensor)]
        if there and wrong and not (name in _PLACES and on_card(args[0])):
            raise WrongDevice(f"{name} mixes a tensor on the card with one of shape {list(wrong[0].shape)} that is not")
        result = func(*args, **kwargs)
        goes = kwargs.get("device") is not None or (
            name == "to" and any(isinstance(value, torch.device) for value in args)
        )
        if (there or goes) and name not in _BACK:
            for tensor in _tensors(result):
                setattr(tensor, _MARK, True)
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
