"""Gradient checkpointing: keep only what enters each decoder layer, and compute the rest again in the backward pass.

About one more forward pass of time for activations of one layer instead of all (arXiv 1604.06174). Transformers' own
switch acts only on modules in training mode, and there the base's dropouts act too; so the layers are wrapped here.
The same operations run on the same values: gradients are equal to the bit, on CPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cotuning.language_model import LanguageModel, decoder_layers


@contextmanager
def recomputed_layers(lm: LanguageModel, *, enabled: bool = True) -> Iterator[None]:
    """Inside, every decoder layer of `lm` keeps its inputs only. Dropout is drawn alike in both passes.

    Raises:
        ValueError: the architecture has no list of decoder layers.
    """
    if not enabled:
        yield
        return
    path = decoder_layers(lm.base, lm.base.config.num_hidden_layers)
    layers = list(lm.base.get_submodule(path))
    for layer in layers:
        layer.forward = partial(_forward, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is found again


def _forward(inner: Any, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return inner(*inputs, **named)
    return checkpoint(inner, *inputs, use_reentrant=False, **named)
