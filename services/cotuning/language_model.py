"""A causal language model with its tokenizer, and the seam between its decoder and its head.

Names: B rows, T tokens, D hidden size, V token ids, N rows of hidden states.

The method never asks a model for all its logits: it takes hidden states and projects only the positions that a loss
needs, chunk by chunk. So the head must be known as numbers (`Head`), with what families do to raw logits: a scale
(Cohere, Granite), a soft cap (Gemma 2), a bias, rows beyond the tokenizer (Qwen). `output_head` reads that from the
config and then checks it against the model's own logits; a family it does not know is refused, never mistrained.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cotuning.heads import Head
from cotuning.token_tables import TokenTable, token_table

_CHECKED_TOKENS = 4


class UnknownHead(ValueError):
    """How this model turns hidden states into logits is not understood."""


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer, and the tokenizer's byte table.

    Attributes:
        model: a transformers `...ForCausalLM`, or a peft model around one.
        tokenizer: a transformers tokenizer.
        table: `token_table(tokenizer)`, built once.
    """

    model: Any
    tokenizer: Any
    table: TokenTable

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "LanguageModel":
        """Put a model and its tokenizer together.

        Raises:
            ValueError: the tokenizer has more ids than the model has embeddings, or no end token.
        """
        table = token_table(tokenizer)
        rows = model.get_input_embeddings().weight.shape[0]
        if rows < table.num_tokens:
            raise ValueError(f"expected embeddings for the tokenizer's {table.num_tokens} ids, the model has {rows}")
        return cls(model, tokenizer, table)

    @property
    def base(self) -> Any:
        """The transformers model itself, adapters injected or not."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def decoder(self) -> Any:
        """The part that gives hidden states: everything but the head."""
        return self.base.base_model

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        device: torch.device = self.base.get_input_embeddings().weight.device
        return device

    @property
    def architecture(self) -> str:
        """`model_type` of the config, for example `gpt2`."""
        return str(self.base.config.model_type)

    @property
    def num_parameters(self) -> int:
        """Of the base model, tied ones once, adapters not counted."""
        return sum(tensor.numel() for name, tensor in self.base.named_parameters() if ".lora_" not in name)

    def with_model(self, model: Any) -> "LanguageModel":
        """The same tokenizer with another model."""
        return replace(self, model=model)


def hidden_states(lm: LanguageModel, input_ids_BT: Tensor) -> Tensor:
    """The last hidden states [B, T, D] of right-padded rows.

    No attention mask: a causal model never looks from a token at the padding to its right, and attention without a
    mask is faster.
    """
    ones_BT = torch.ones_like(input_ids_BT)
    output = lm.decoder(input_ids=input_ids_BT, attention_mask=ones_BT, use_cache=False, return_dict=True)
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD


def all_hidden_states(lm: LanguageModel, input_ids_BT: Tensor) -> tuple[Tensor, ...]:
    """The hidden states [B, T, D] of right-padded rows after the embedding and after each layer.

    The last one is what `hidden_states` gives: normed, as the head reads it.
    """
    ones_BT = torch.ones_like(input_ids_BT)
    output = lm.decoder(
        input_ids=input_ids_BT, attention_mask=ones_BT, use_cache=False, return_dict=True, output_hidden_states=True
    )
    return (*output.hidden_states[:-1], output.last_hidden_state)


def decoder_layers(model: torch.nn.Module, total: int) -> str:
    """Name of the list of `total` decoder layers in a model.

    Raises:
        ValueError: it has none.
    """
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == total
    ]
    if not paths:
        raise ValueError(f"expected a list of {total} decoder layers in {type(model).__name__}, found none")
    return str(min(paths, key=lambda name: name.count(".")))


def output_head(lm: LanguageModel) -> Head:
    """The model's head, cut to the tokenizer's ids, checked against the model's own logits on a few tokens.

    Raises:
        UnknownHead: the head is not a plain linear layer, or the logits are something else than scale, bias and soft
            cap of it.
    """
    layer = lm.base.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise UnknownHead(f"expected a linear head without an adapter, got {type(layer).__name__}")
    config = lm.base.config
    head = Head(
        weight_VD=layer.weight,
        num_tokens=lm.table.num_tokens,
        bias_V=layer.bias,
        logit_scale=_logit_scale(config),
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )
    _check(lm, head)
    return head


def logits(hidden_ND: Tensor, head: Head) -> Tensor:
    """The logits [N, V] of hidden rows, float32 (float64 if the head is)."""
    weight_VD = head.weight_VD[: head.num_tokens]
    raw_NV = hidden_ND.to(weight_VD.dtype) @ weight_VD.T
    raw_NV = raw_NV if raw_NV.dtype is torch.float64 else raw_NV.float()
    if head.bias_V is not None:
        raw_NV = raw_NV + head.bias_V[: head.num_tokens]
    if head.logit_scale != 1.0:
        raw_NV = raw_NV * head.logit_scale
    if head.soft_cap is not None:
        raw_NV = head.soft_cap * torch.tanh(raw_NV / head.soft_cap)
    return raw_NV


def _logit_scale(config: Any) -> float:
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier_scale"):
        scale = getattr(config, name, None)
        if isinstance(scale, int | float):
            return float(scale)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 / float(divisor) if divisor else 1.0


@torch.no_grad()
def _check(lm: LanguageModel, head: Head) -> None:
    # Different rows and positions, so that a wrong scale, cap or bias cannot cancel.
    ids_BT = torch.arange(_CHECKED_TOKENS, device=lm.device).remainder(lm.table.num_tokens)[None]
    training = lm.base.training
    lm.base.eval()
    try:
        own_BTV = lm.base(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
        split_BTV = logits(hidden_states(lm, ids_BT), head)
    finally:
        lm.base.train(training)
    own_BTV = own_BTV[..., : head.num_tokens].to(split_BTV.dtype)
    tolerance = 1e-3 if head.weight_VD.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(own_BTV, split_BTV, rtol=tolerance, atol=tolerance * float(own_BTV.abs().max())):
        difference = float((own_BTV - split_BTV).abs().max())
        raise UnknownHead(
            f"{lm.architecture}: expected logits to be scale, bias and soft cap of head times hidden state; "
            f"they differ by up to {difference:.3g}"
        )
