from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from cotuning.cross_entropy import response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.language_model import LanguageModel, hidden_states, output_head
from cotuning.proxy_creation import create_proxy
from cotuning.width_pruning import measure_importance
from tests.tiny_models import MAX_POSITIONS, tiny_examples, tiny_language_model

PUBLIC = tiny_examples(20, start=300)


def qwen3() -> LanguageModel:
    """Heads with a size of their own, and norms over it: 4 heads of 6 in 2 groups, hidden size 16."""
    like = tiny_language_model("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=like.table.num_tokens,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            max_position_embeddings=MAX_POSITIONS,
        )
        model = Qwen3ForCausalLM(config)
    return like.with_model(model.eval().requires_grad_(False))


def pruned(llm: LanguageModel, layers: int, **changes: Any) -> LanguageModel:
    return create_proxy(llm, source="prune", layers=layers, examples=PUBLIC, max_length=64, seed=0, **changes)


def same_answers(a: LanguageModel, b: LanguageModel) -> None:
    ids_BT = torch.tensor([[1, 5, 9, 4], [7, 7, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(a, ids_BT), hidden_states(b, ids_BT), rtol=1e-4, atol=1e-5)


def silence_neurons(llm: LanguageModel, kept: list[int]) -> None:
    for layer in llm.model.model.layers:
        silent = [neuron for neuron in range(layer.mlp.up_proj.weight.shape[0]) if neuron not in kept]
        layer.mlp.up_proj.weight[silent] = 0.0


def test_importance_equals_a_slow_formula() -> None:
    llm = tiny_language_model("qwen2")
    got = measure_importance(llm, PUBLIC, max_length=64)
    rows = EncodedRows(llm, PUBLIC, max_length=64)
    heads, neurons = torch.zeros(2, 4).double(), torch.zeros(2, 24).double()
    count = 0
    for index in range(len(PUBLIC)):  # row by row: padding must not matter
        batch = rows.batch([index])
        places = response_tokens(batch).position_N.tolist()
        count += len(places)
        for number, layer in enumerate(llm.model.model.layers):
            seen: dict[str, Any] = {}
            for name, module in (("out", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
                seen[name + "_hook"] = module.register_forward_pre_hook(
                    lambda _, x, name=name, seen=seen: seen.__setitem__(name, x[0])
                )
            with torch.no_grad():
                hidden_states(llm, batch.input_ids_BT)
            for place in places:
                for head in range(4):
                    heads[number, head] += seen["out"][0, place, head * 4 : head * 4 + 4].double().norm()
                neurons[number] += seen["down"][0, place].double().abs()
            seen["out_hook"].remove()
            seen["down_hook"].remove()
    for number in range(2):
        torch.testing.assert_close(got[number].heads_H, heads[number] / count, rtol=1e-5, atol=0)
        torch.testing.assert_close(got[number].neurons_F, neurons[number] / count, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [lambda: tiny_language_model("llama"), lambda: tiny_language_model("qwen2"), qwen3])
def test_cutting_silent_neurons_changes_no_answer(make: Any) -> None:
    llm = make()
    silence_neurons(llm, [3, 1, 11])
    proxy = pruned(llm, llm.model.config.num_hidden_layers, neuron_share=3 / llm.model.config.intermediate_size)
    assert proxy.model.config.intermediate_size == 3
    for own, small in zip(llm.model.model.layers, proxy.model.model.layers, strict=True):
        assert torch.equal(small.mlp.up_proj.weight, own.mlp.up_proj.weight[[1, 3, 11]])
        assert torch.equal(small.mlp.down_proj.weight, own.mlp.down_proj.weight[:, [1, 3, 11]])
    same_answers(llm, proxy)


def test_neurons_are_cut_in_other_families_too() -> None:
    llm = tiny_language_model("opt")
    for layer in llm.model.model.decoder.layers:
        layer.fc2.weight[:, 5:] = 0.0  # speaks, unheard
        layer.fc1.weight[5:] = 0.0
        layer.fc1.bias[5:] = 0.0
    proxy = pruned(llm, 2, neuron_share=5 / 32)
    assert proxy.model.config.ffn_dim == 5
    same_answers(llm, proxy)
    gpt2 = tiny_language_model("gpt2")
    for block in gpt2.model.transformer.h:
        block.mlp.c_fc.weight[:, 8:] = 0.0
        block.mlp.c_fc.bias[8:] = 0.0  # gelu(0) is 0
    small = pruned(gpt2, 2, neuron_share=8 / 64)
    assert small.model.config.n_inner == 8
    same_answers(gpt2, small)


@pytest.mark.parametrize("make", [lambda: tiny_language_model("qwen2"), qwen3])
@pytest.mark.parametrize("group", [0, 1])
def test_cutting_silent_heads_changes_no_answer(make: Any, group: int) -> None:
    llm = make()
    size = llm.model.model.layers[0].self_attn.head_dim
    for layer in llm.model.model.layers:
        silent = slice((1 - group) * size, (2 - group) * size)
        layer.self_attn.v_proj.weight[silent] = 0.0  # the group's value: both of its heads say nothing
        if layer.self_attn.v_proj.bias is not None:
            layer.self_attn.v_proj.bias[silent] = 0.0
    proxy = pruned(llm, 2, head_share=0.5)
    config = proxy.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, size)
    own, small = llm.model.model.layers[1].self_attn, proxy.model.model.layers[1].self_attn
    assert torch.equal(small.q_proj.weight, own.q_proj.weight[group * 2 * size : (group + 1) * 2 * size])
    assert torch.equal(small.k_proj.weight, own.k_proj.weight[group * size : (group + 1) * size])
    same_answers(llm, proxy)
    output_head(proxy)


def test_depth_and_width_together_and_a_folder_of_it_loads(tmp_path: Any) -> None:
    from assets.models import load_language_model, save_language_model

    llm = qwen3()
    proxy = pruned(llm, 1, head_share=0.5, neuron_share=0.5)
    assert proxy.num_parameters < pruned(llm, 1).num_parameters < llm.num_parameters
    save_language_model(proxy, tmp_path)
    same_answers(load_language_model(tmp_path), proxy)


def test_importance_chooses_better_than_the_opposite() -> None:
    llm = tiny_language_model("llama")
    layer = llm.model.model.layers[1]
    layer.mlp.up_proj.weight[::2] *= 20.0
    proxy = pruned(llm, 3, neuron_share=0.5)
    assert torch.equal(proxy.model.model.layers[1].mlp.up_proj.weight, layer.mlp.up_proj.weight[::2])


def test_full_shares_are_plain_pruning_and_ask_for_no_rows() -> None:
    llm = tiny_language_model("llama")
    plain = create_proxy(llm, source="prune", layers=2, seed=0)
    full = create_proxy(llm, source="prune", layers=2, head_share=1.0, neuron_share=1.0, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), full.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom"])
def test_families_whose_heads_grow_when_there_are_fewer_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a family whose heads can be cut"):
        pruned(tiny_language_model(name), 1, head_share=0.5)


def test_impossible_shares_are_refused() -> None:
    llm = tiny_language_model("llama")
    with pytest.raises(ValueError, match="expected head_share above 0 and at most 1, got 0"):
        pruned(llm, 1, head_share=0)
    with pytest.raises(ValueError, match=r"expected neuron_share above 0 and at most 1, got 1\.5"):
        pruned(llm, 1, neuron_share=1.5)
    with pytest.raises(ValueError, match="expected public rows to measure"):
        create_proxy(llm, source="prune", layers=1, neuron_share=0.5, seed=0)
    with pytest.raises(ValueError, match="expected no shares for source 'config'"):
        create_proxy(llm, source="config", layers=1, neuron_share=0.5, seed=0)
    with pytest.raises(ValueError, match="bloom: expected a setting for the number of neurons"):
        pruned(tiny_language_model("bloom"), 1, neuron_share=0.5)
