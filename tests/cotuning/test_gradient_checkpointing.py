"""Recomputed layers give the gradients of kept ones, from less memory."""

from typing import Any

import pytest
import torch

from cotuning.adapters import activate, adapted, lora_config
from cotuning.gradient_checkpointing import recomputed_layers
from cotuning.language_model import LanguageModel, hidden_states
from cotuning.seeding import isolated_generators
from tests.tiny_models import NAMES, tiny_language_model

IDS_BT = torch.arange(2 * 24).remainder(50).view(2, 24) + 3


def saved_bytes_and_gradients(lm: LanguageModel, enabled: bool) -> tuple[int, list[torch.Tensor]]:
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    config = lora_config(lm, rank=2, alpha=4.0, dropout=0.3)
    with adapted(lm, config, {"slm": 5}) as lent, recomputed_layers(lent, enabled=enabled), isolated_generators(3):
        activate(lent, ["slm"], trainable=["slm"])
        for name, module in lent.model.named_modules():
            if ".lora_dropout." in name:
                module.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = hidden_states(lent, IDS_BT).square().mean()
        kept = sum(sizes.values())
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [each.grad.clone() for each in lent.model.parameters() if each.grad is not None]
    return kept, gradients


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_equal_to_the_bit_dropout_and_all_and_less_is_kept(name: str) -> None:
    kept, expected = saved_bytes_and_gradients(tiny_language_model(name), enabled=False)
    fewer, got = saved_bytes_and_gradients(tiny_language_model(name), enabled=True)
    assert expected
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert fewer < kept / 3


def test_the_model_is_given_back_as_it_came() -> None:
    lm = tiny_language_model("llama")
    layer: Any = lm.model.model.layers[0]
    too_long = torch.zeros(1, 2, 3, dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError, IndexError)), recomputed_layers(lm):
        hidden_states(lm, too_long)
    assert "forward" not in vars(layer)
    with recomputed_layers(lm):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)


def test_without_gradients_nothing_is_recomputed() -> None:
    lm = tiny_language_model("llama")
    calls: list[None] = []
    lm.model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(None))
    with recomputed_layers(lm), torch.no_grad():
        hidden_states(lm, IDS_BT)
    assert len(calls) == 1
