"""The settings of each strategy, and what each one lets cross the network, as data.

A strategy's mathematics lives in `cotuning.strategies`; here is only what must be said before it can start. The
discriminator is `name`. Symbols as in the Co-PLMs paper (arXiv 2511.11678): theta the proxy's shared adapter, phi_i a
device's domain adapter, psi_i a device's SLM adapter, omega the LLM's adapter.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from protocol.base import MAX_COUNT, SettingsModel
from protocol.statuses import PartKind

Matching = Literal["fold", "ce_only", "uld", "gold", "mined_dtw", "alm"]


class LoraSettings(SettingsModel):
    """Low-rank adapters (LoRA, arXiv 2106.09685); the same meaning as in peft."""

    rank: int = Field(default=8, ge=1, le=1024)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = Field(default="all-linear", description="As in peft.")


class Batches(SettingsModel):
    """How many rows a step reads, and how many at a time."""

    batch_size: int = Field(default=16, ge=1, le=4096, description="Rows a step.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Rows of a step in memory at a time, null for all: less memory, more time. Losses and gradients "
        "are those of the whole step.",
    )

    @property
    def rows_at_once(self) -> int:
        """Rows in memory at a time."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


class LocalTraining(Batches):
    """One model's training on one device: optimizer steps are the budget, never seconds."""

    steps: int = Field(default=60, ge=1, le=1_000_000, description="Optimizer steps a round.")
    learning_rate: float = Field(
        default=5e-3, gt=0, description="AdamW, started anew each round: linear warm-up over a tenth of its steps."
    )
    weight_decay: float = Field(default=0.0, ge=0)
    max_length: int = Field(
        default=256, ge=16, le=131_072, description="Tokens a row; longer rows lose their prompt's head."
    )
    gradient_clip: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Autocast dtype of the forward pass."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Keep less for the backward pass and compute it again: less memory, more time."
    )


class StandaloneSettings(SettingsModel):
    """Each device tunes its own SLM on its own data (psi_i on D_i by cross-entropy); only numbers leave."""

    name: Literal["standalone"] = "standalone"
    slm_lora: LoraSettings = LoraSettings()
    training: LocalTraining = LocalTraining()


class ServerTraining(Batches):
    """SAML between the LLM and the proxy on the public set, once a round."""

    steps: int = Field(default=40, ge=0, le=1_000_000)
    llm_learning_rate: float = Field(default=1e-3, gt=0)
    proxy_learning_rate: float = Field(default=2e-3, gt=0)
    max_length: int = Field(default=256, ge=16, le=131_072)
    gradient_clip: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = Field(default=False, description="As in `training`; of the LLM and the proxy.")
    device_teacher: Literal["least_ce", "ce_weighted", "off"] = Field(
        default="least_ce",
        description="How the devices' probe-set logits become a teacher (FedMKT's choice: least_ce).",
    )
    device_teacher_weight: float = Field(default=1.0, ge=0)
    probe_fraction: float = Field(
        default=0.25, ge=0, lt=1, description="Share of each batch drawn from probe rows that a device's logits teach."
    )
    checkpoint_steps: int = Field(
        default=20, ge=0, description="Steps between two states on the worker's disk; 0: none, a kill costs them all."
    )


class ServerOptimizerSettings(SettingsModel):
    """What the server makes of the mean delta: FedAvg, FedAvgM (arXiv 1909.06335) or FedAdam (arXiv 2003.00295)."""

    name: Literal["sgd", "momentum", "adam"] = "sgd"
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the momentum; for `momentum` and `adam`.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="Decay of the mean square; for `adam`.")
    tau: float = Field(default=1e-3, gt=0, description="Added to the root of the mean square; for `adam`.")


class CoPlmsSettings(SettingsModel):
    """Co-PLMs: domain-specific tuning, then structure-agnostic mutual learning on the device and on the server."""

    name: Literal["co_plms"] = "co_plms"
    slm_lora: LoraSettings = LoraSettings()
    proxy_lora: LoraSettings = LoraSettings()
    llm_lora: LoraSettings = LoraSettings()
    training: LocalTraining = Field(default=LocalTraining(), description="The SAML steps on the device.")
    domain_steps: int = Field(default=20, ge=0, description="DST: steps that train phi_i with the rest frozen.")
    proxy_learning_rate: float = Field(default=2e-3, gt=0, description="For theta and phi on the device.")
    alpha: float = Field(default=1.0, ge=0, description="Weight of D(proxy -> SLM) in the SLM's loss.")
    beta: float = Field(default=1.0, ge=0, description="Weight of D(SLM -> proxy) in the proxy's loss.")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    jsd_beta: float = Field(default=0.5, gt=0, lt=1, description="Only for `jsd`: the mixture's weight of the teacher.")
    temperature: float = Field(default=1.0, gt=0, le=20)
    matching: Matching = Field(
        default="fold",
        description="What the two models of SAML compare: distributions folded onto common classes; or, to compare "
        "methods with: nothing (ce_only), sorted probabilities (uld), GOLD's hybrid (gold), top tokens mapped by edit "
        "distance and DTW (mined_dtw), span likelihoods (alm). With ce_only no device's logits teach either.",
    )
    span_likelihood_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight, beside matching fold only, of the divergence of likelihoods of spans of several tokens.",
    )
    public_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Share of a device's SAML batches drawn from the public probe set."
    )
    top_k: int = Field(default=32, ge=1, le=1024, description="Classes kept of each probe distribution.")
    logits_values: Literal["int7", "int8", "float16"] = Field(
        default="int7",
        description="How log-probabilities travel: int7 within 0.16 nats in rows that span 20, less in narrower ones; "
        "int8 within half of that for a twentieth more bytes; float16 within 0.02 for two fifths more.",
    )
    min_coverage: float = Field(
        default=0.8, ge=0, le=1, description="Below it an update is not used: alignment did not work on that device."
    )
    aggregation: Literal["fedavg", "exact_svd"] = Field(
        default="fedavg",
        description="Mean of A and of B apart, or of the products BA, cut to the rank by singular values.",
    )
    device_ranks: Literal["uniform", "declared"] = Field(
        default="uniform",
        description="Rank at which a device trains the shared adapter: the run's, `proxy_lora.rank`; or `declared`, at "
        "most what its profile says (`max_adapter_rank`), which needs `aggregation` exact_svd.",
    )
    server_optimizer: ServerOptimizerSettings = ServerOptimizerSettings()
    server_learning_rate: float = Field(
        default=1.0,
        gt=0,
        description="eta in theta + eta * mean(delta). `adam` moves a value by at most about eta: 1e-3 to 1e-2.",
    )
    max_examples: int = Field(
        default=100_000, ge=1, le=MAX_COUNT, description="An update weighs at most so many examples, whatever it says."
    )
    max_update_norm: float = Field(default=1e3, gt=0, description="L2 norm over which a delta is refused.")
    norm_gate: Literal["off", "quarantine", "reject"] = Field(
        default="off",
        description="What becomes of an update whose norm is far from the round's others: nothing; kept, not counted "
        "and shown; or refused.",
    )
    norm_gate_deviations: float = Field(
        default=6.0,
        ge=1,
        description="How far from the median is far, in standard deviations as the median absolute deviation tells.",
    )
    norm_gate_min_updates: int = Field(
        default=5, ge=3, description="With fewer updates no distribution can be told, and nothing is held back."
    )
    server: ServerTraining = ServerTraining()

    @model_validator(mode="after")
    def _products_have_no_momentum(self) -> Self:
        # Re-factoring turns A and B into another basis each round: a mean over rounds of their deltas means nothing.
        if self.aggregation != "fedavg" and self.server_optimizer.name != "sgd":
            name = self.server_optimizer.name
            raise ValueError(f"`aggregation` {self.aggregation} goes with `server_optimizer.name` sgd, got {name}")
        return self

    @model_validator(mode="after")
    def _other_ranks_are_averaged_as_products(self) -> Self:
        # Factors of different ranks, padded with zeros, average to something that no device and no product stands for.
        if self.device_ranks != "uniform" and self.aggregation != "exact_svd":
            raise ValueError(
                f"`device_ranks` {self.device_ranks} goes with `aggregation` exact_svd, got {self.aggregation}"
            )
        return self

    def rank_for(self, declared: int | None) -> int:
        """Rank at which a device trains the shared adapter; `declared` is the most its profile says it takes."""
        rank = self.proxy_lora.rank
        return rank if self.device_ranks == "uniform" or declared is None else min(rank, declared)

    @model_validator(mode="after")
    def _one_likelihood_term(self) -> Self:
        if self.span_likelihood_weight and self.matching != "fold":
            raise ValueError(
                "expected span_likelihood_weight 0, or matching 'fold' which alone takes that term; "
                f"got {self.span_likelihood_weight} beside {self.matching!r}"
            )
        return self


Strategy = Annotated[CoPlmsSettings | StandaloneSettings, Field(discriminator="name")]


@dataclass(frozen=True)
class StrategySpec:
    """What a strategy needs and what it lets cross the network."""

    uploads: frozenset[PartKind]
    needs_proxy: bool


STRATEGIES: dict[str, StrategySpec] = {
    "co_plms": StrategySpec(uploads=frozenset({PartKind.ADAPTER_DELTA, PartKind.LOGITS}), needs_proxy=True),
    "standalone": StrategySpec(uploads=frozenset(), needs_proxy=False),
}
"""Every strategy by name. The API validates against it without importing torch."""
