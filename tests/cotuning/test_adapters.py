from typing import Any

import pytest
import torch

from cotuning.adapters import (
    AdapterMismatch,
    activate,
    adapted,
    adapter_parameters,
    adapter_state,
    add,
    attach_adapter,
    fresh_adapter,
    load_adapter_state,
    lora_config,
    subtract,
)
from cotuning.language_model import LanguageModel, UnknownHead, hidden_states, output_head
from tests.tiny_models import NAMES, tiny_language_model


def config(lm: LanguageModel, **changes: Any) -> Any:
    return lora_config(lm, **{"rank": 2, "alpha": 4.0} | changes)


def some_state(lm: LanguageModel, seed: int) -> dict[str, torch.Tensor]:
    """An adapter that does something: A and B both drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    fresh = fresh_adapter(lm, config(lm), seed=seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in fresh.items()}


def outputs(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return hidden_states(lm, torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]))


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_adapter_changes_nothing_and_a_loaded_one_does(name: str) -> None:
    lm = tiny_language_model(name)
    before = outputs(lm)
    with adapted(lm, config(lm), {"first": 7}) as lent:
        assert torch.equal(outputs(lent), before)
    with adapted(lm, config(lm), {"first": some_state(lm, 1)}) as lent:
        assert not torch.allclose(outputs(lent), before)
    assert torch.equal(outputs(lm), before)


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip_is_exact(name: str) -> None:
    lm = tiny_language_model(name)
    state = some_state(lm, 3)
    with adapted(lm, config(lm), {"first": state, "second": 1}) as lent:
        assert adapter_state(lent, "first").keys() == state.keys()
        assert all(torch.equal(adapter_state(lent, "first")[key], state[key]) for key in state)
        load_adapter_state(lent, "second", state)
        assert all(torch.equal(adapter_state(lent, "second")[key], state[key]) for key in state)
    assert all(".lora_" in key and ".first." not in key for key in state)


def test_the_state_is_a_copy() -> None:
    lm = tiny_language_model("llama")
    with adapted(lm, config(lm), {"first": 1}) as lent:
        state = adapter_state(lent, "first")
        for parameter in adapter_parameters(lent, "first").values():
            parameter.data.add_(1)
        assert not torch.equal(adapter_state(lent, "first")[next(iter(state))], state[next(iter(state))])


def test_the_model_comes_back_as_it_went_even_after_an_error() -> None:
    lm = tiny_language_model("gpt2")
    names = [name for name, _ in lm.model.named_modules()]
    with pytest.raises(RuntimeError, match="in the middle"), adapted(lm, config(lm), {"first": 1, "second": 2}):
        raise RuntimeError("in the middle")
    assert [name for name, _ in lm.model.named_modules()] == names
    assert not any(tensor.requires_grad for tensor in lm.model.parameters())
    assert not hasattr(lm.model, "peft_config")


def test_initial_values_follow_from_the_seed_alone_and_disturb_no_generator() -> None:
    lm = tiny_language_model("bloom")
    state = torch.get_rng_state()
    first = fresh_adapter(lm, config(lm), seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = fresh_adapter(lm, config(lm), seed=11), fresh_adapter(lm, config(lm), seed=12)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_two_active_adapters_add_up_and_only_the_chosen_one_learns() -> None:
    lm = tiny_language_model("llama")
    shared, domain = some_state(lm, 1), some_state(lm, 2)
    with adapted(lm, config(lm), {"shared": shared, "domain": domain}) as lent:
        both = outputs(lent)
        activate(lent, ["shared"])
        assert not torch.allclose(outputs(lent), both)
        activate(lent, [])
        torch.testing.assert_close(outputs(lent), outputs(tiny_language_model("llama")))
        activate(lent, ["shared", "domain"], trainable=["shared"])
        assert torch.equal(outputs(lent), both)
        hidden_states(lent, torch.tensor([[1, 2, 3]])).square().sum().backward()
        assert all(tensor.grad is not None for tensor in adapter_parameters(lent, "shared").values())
        assert all(tensor.grad is None for tensor in adapter_parameters(lent, "domain").values())
        assert all(tensor.grad is None for name, tensor in lent.model.named_parameters() if ".lora_" not in name)


def test_both_active_is_the_sum_of_the_low_rank_updates() -> None:
    """For one linear layer, by the formula: W x + s (B1 A1 + B2 A2) x."""
    lm = tiny_language_model("llama")
    narrow = config(lm, target_modules=["down_proj"])
    with adapted(lm, narrow, {"shared": 1, "domain": 2}) as lent:
        layer = lent.base.model.layers[0].mlp.down_proj
        generator = torch.Generator().manual_seed(0)
        for name in ("shared", "domain"):
            layer.lora_B[name].weight.data.normal_(generator=generator)
        x = torch.randn(3, layer.in_features, generator=generator)
        update = sum(layer.lora_B[name].weight @ layer.lora_A[name].weight for name in ("shared", "domain"))
        expected = x @ (layer.base_layer.weight + 4.0 / 2 * update).T
        torch.testing.assert_close(layer(x), expected)


def test_wrong_names_and_shapes_are_refused_and_change_nothing() -> None:
    lm = tiny_language_model("qwen2")
    state = some_state(lm, 1)
    key = next(iter(state))
    with adapted(lm, config(lm), {"first": state}) as lent:
        with pytest.raises(AdapterMismatch, match=r"wrong tensor names: expected .*lora_A.* got nothing"):
            load_adapter_state(lent, "first", {name: tensor for name, tensor in state.items() if name != key})
        with pytest.raises(AdapterMismatch, match=r"got surplus"):
            load_adapter_state(lent, "first", state | {"surplus": torch.zeros(1)})
        with pytest.raises(AdapterMismatch, match=r"shape of .*: expected \[2, 24\], got \[1\]"):
            load_adapter_state(
                lent, "first", {name: tensor + 1 for name, tensor in state.items()} | {key: torch.zeros(1)}
            )
        assert all(torch.equal(adapter_state(lent, "first")[name], state[name]) for name in state)


def test_an_adapter_on_the_head_is_refused() -> None:
    lm = tiny_language_model("llama")
    with (
        adapted(lm, config(lm, target_modules=["lm_head"]), {"first": 1}) as lent,
        pytest.raises(UnknownHead, match="expected a linear head without an adapter"),
    ):
        output_head(lent)


def test_unknown_names_are_refused() -> None:
    lm = tiny_language_model("llama")
    with pytest.raises(ValueError, match="without dots"):
        attach_adapter(lm, "first.second", config(lm), seed=0)
    with adapted(lm, config(lm), {"first": 1, "second": 2}) as lent:
        with pytest.raises(ValueError, match=r"expected names among \['first', 'second'\]"):
            activate(lent, ["third"])
        with pytest.raises(ValueError, match="trainable ones among the active"):
            activate(lent, ["first"], trainable=["second"])


def test_adapters_of_a_bfloat16_model_are_float32() -> None:
    lm = tiny_language_model("llama")
    lm.model.to(torch.bfloat16)
    state = fresh_adapter(lm, config(lm), seed=0)
    with adapted(lm, config(lm), {"first": state}) as lent:
        assert {tensor.dtype for tensor in adapter_parameters(lent, "first").values()} == {torch.float32}


def test_adding_a_difference_gives_back_and_zero_changes_nothing() -> None:
    lm = tiny_language_model("opt")
    before, after = some_state(lm, 1), some_state(lm, 2)
    restored = add(before, subtract(after, before))
    for key in before:
        torch.testing.assert_close(restored[key], after[key])
    zero = subtract(before, before)
    assert all(torch.equal(add(before, zero)[key], before[key]) for key in before)
