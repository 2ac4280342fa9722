from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from cotuning.language_model import LanguageModel, UnknownHead, hidden_states, logits, output_head
from tests.tiny_models import NAMES, tiny_language_model, tiny_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def family(name: str, **extra: Any) -> LanguageModel:
    tokenizer = tiny_tokenizer("byte_bpe")
    classes: dict[str, Any] = {
        "cohere": (CohereConfig, CohereForCausalLM),
        "granite": (GraniteConfig, GraniteForCausalLM),
        "gemma2": (Gemma2Config, Gemma2ForCausalLM),
        "phi": (PhiConfig, PhiForCausalLM),
    }
    make_config, make_model = classes[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        model = make_model(make_config(vocab_size=len(tokenizer) + 7, **SMALL, **ids, **extra))
        head = model.get_output_embeddings()
        torch.nn.init.normal_(head.weight, std=0.5)
        if head.bias is not None:
            torch.nn.init.normal_(head.bias, std=0.5)
    return LanguageModel.of(model.eval(), tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_times_head_are_the_models_logits(name: str) -> None:
    lm = tiny_language_model(name)
    ids_BT = torch.randint(0, lm.table.num_tokens, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own_BTV = lm.model(input_ids=ids_BT).logits[..., : lm.table.num_tokens]
        split_BTV = logits(hidden_states(lm, ids_BT), output_head(lm))
    torch.testing.assert_close(split_BTV, own_BTV)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 5.0}),
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
        ("phi", {}),  # a bias in the head
    ],
)
def test_scale_soft_cap_bias_and_surplus_rows_of_the_head_are_known(name: str, extra: dict[str, Any]) -> None:
    lm = family(name, **extra)
    ids_BT = torch.tensor([[5, 9, 2, 7, 1]])
    with torch.no_grad():
        own_BTV = lm.model(input_ids=ids_BT).logits
        split_BTV = logits(hidden_states(lm, ids_BT), output_head(lm))
    assert split_BTV.shape[-1] == lm.table.num_tokens == own_BTV.shape[-1] - 7
    torch.testing.assert_close(split_BTV, own_BTV[..., : lm.table.num_tokens])


class _Doubled(GPT2LMHeadModel):
    """A family that does something to its logits that no config says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_a_head_that_is_not_understood_is_refused() -> None:
    tokenizer = tiny_tokenizer("byte_bpe")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=32)
    lm = LanguageModel.of(_Doubled(config).eval(), tokenizer)
    with pytest.raises(UnknownHead, match=r"gpt2: expected logits to be scale, bias and soft cap .* differ by up to"):
        output_head(lm)


def test_right_padding_changes_nothing_to_its_left() -> None:
    for name in NAMES:
        lm = tiny_language_model(name)
        short_BT = torch.tensor([[4, 8, 15, 16]])
        padded_BT = torch.cat([short_BT, torch.full((1, 5), lm.table.end_id)], 1)
        with torch.no_grad():
            short_BTD, padded_BTD = hidden_states(lm, short_BT), hidden_states(lm, padded_BT)
        torch.testing.assert_close(padded_BTD[:, :4], short_BTD)


def test_too_few_embeddings_for_the_tokenizer_are_refused() -> None:
    lm = tiny_language_model("bloom")
    with pytest.raises(ValueError, match="expected embeddings for the tokenizer's 360 ids, the model has 98"):
        LanguageModel.of(lm.model, tiny_tokenizer("byte_bpe"))


def test_parameters_are_counted_once_and_without_adapters() -> None:
    lm = tiny_language_model("gpt2")
    assert lm.num_parameters == sum(tensor.numel() for tensor in lm.model.parameters())
    assert lm.architecture == "gpt2"
