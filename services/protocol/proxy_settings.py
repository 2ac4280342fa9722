"""How a run's distilled proxy model is made. By itself, because what makes it knows nothing of runs."""

from typing import Literal

from pydantic import Field, model_validator

from protocol.base import SettingsModel


class ProxySettings(SettingsModel):
    """How the distilled proxy model (DPM) is made from the LLM, once, before the first round."""

    source: Literal["pretrained", "prune", "config"] = Field(
        default="prune",
        description="`pretrained`: the model in `path`; `prune`: every k-th layer of the LLM; `config`: a fresh one.",
    )
    path: str | None = Field(default=None, description="Only for `pretrained`.")
    layers: int = Field(default=2, ge=1, description="`prune`, `config`: layers kept or made.")
    head_share: float = Field(
        default=1.0, gt=0, le=1, description="`prune`: share of the attention heads kept, by importance on public rows."
    )
    neuron_share: float = Field(
        default=1.0, gt=0, le=1, description="`prune`: share of the feed-forward neurons kept, likewise."
    )
    hidden_size: int | None = Field(default=None, ge=8, description="`config`: width; default half of the LLM's.")
    steps: int = Field(default=100, ge=0, description="Distillation steps on the public set.")
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    distillation_weight: float = Field(default=0.5, ge=0, le=1, description="lambda in (1-lambda) CE + lambda tau^2 D.")
    temperature: float = Field(default=1.0, gt=0, le=20)
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    jsd_beta: float = Field(default=0.5, gt=0, lt=1, description="Only for `jsd`: the mixture's weight of the teacher.")
    feature_weight: float = Field(default=0.0, ge=0, description="Of the loss between projected hidden states.")
    relation_weight: float = Field(
        default=0.0, ge=0, description="Of the loss between similarities of tokens' hidden states."
    )
    on_policy_fraction: float = Field(
        default=0.0, ge=0, le=1, description="Share of the steps on responses that the proxy samples itself (GKD)."
    )
    on_policy_tokens: int = Field(default=64, ge=1, le=4096, description="Longest of these responses.")
    max_length: int = Field(default=256, ge=16)
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = Field(
        default=False, description="Keep less for the backward pass and compute it again: less memory, more time."
    )
    checkpoint_steps: int = Field(
        default=50, ge=0, description="Steps between two states of the distillation on disk; 0: none."
    )

    @model_validator(mode="after")
    def _shares_only_for_prune(self) -> "ProxySettings":
        if self.source != "prune" and (self.head_share, self.neuron_share) != (1.0, 1.0):
            raise ValueError("`head_share` and `neuron_share` are for source `prune` only")
        return self

    @model_validator(mode="after")
    def _on_policy_needs_a_teacher(self) -> "ProxySettings":
        if self.on_policy_fraction and not (self.distillation_weight or self.feature_weight or self.relation_weight):
            raise ValueError("`on_policy_fraction` needs a `distillation_weight`, or a weight of hidden states")
        return self

    @model_validator(mode="after")
    def _path_only_for_pretrained(self) -> "ProxySettings":
        if (self.source == "pretrained") != (self.path is not None):
            raise ValueError("`path` is required for source `pretrained` and for no other")
        return self
