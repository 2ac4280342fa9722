"""Co-PLMs (arXiv 2511.11678). Symbols as in the paper: theta the proxy's shared adapter, phi_i a device's domain
adapter, psi_i a device's SLM adapter, omega the LLM's adapter.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from protocol.statuses import PartKind
from protocol.strategies.settings import AveragingSettings, LocalTraining, LoraSettings, ServerSteps
from protocol.strategies.spec import DownloadKind, PublicSet, SmallModel, StrategySpec

Matching = Literal["fold", "ce_only", "uld", "gold", "mined_dtw", "alm"]


class ServerTraining(ServerSteps):
    """SAML between the LLM and the proxy on the public set, once a round."""

    proxy_learning_rate: float = Field(default=2e-3, gt=0)
    device_teacher: Literal["least_ce", "ce_weighted", "off"] = Field(
        default="least_ce",
        description="How the devices' probe-set logits become a teacher (FedMKT's choice: least_ce).",
    )
    device_teacher_weight: float = Field(default=1.0, ge=0)
    probe_fraction: float = Field(
        default=0.25, ge=0, lt=1, description="Share of each batch drawn from probe rows that a device's logits teach."
    )


class CoPlmsSettings(AveragingSettings):
    """Co-PLMs: domain-specific tuning, then structure-agnostic mutual learning on the device and on the server."""

    name: Literal["co_plms"] = "co_plms"
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
    device_ranks: Literal["uniform", "declared"] = Field(
        default="uniform",
        description="Rank at which a device trains the shared adapter: the run's, `proxy_lora.rank`; or `declared`, at "
        "most what its profile says (`max_adapter_rank`), which needs `aggregation` exact_svd.",
    )
    freeze_proxy: bool = Field(
        default=False,
        description="Theta stays as round 1 found it, on devices and on the server: the proxy teaches and learns "
        "nothing but the domain. A control: what remains is not of mutual learning.",
    )
    server: ServerTraining = ServerTraining()

    @property
    def shared_lora(self) -> LoraSettings:
        """The proxy's."""
        return self.proxy_lora

    @property
    def trained_llm_lora(self) -> LoraSettings:
        """omega's."""
        return self.llm_lora

    @property
    def server_steps(self) -> ServerTraining:
        """SAML on public rows."""
        return self.server

    @property
    def least_coverage(self) -> float:
        """What devices learn comes through an alignment."""
        return self.min_coverage

    @property
    def kept_classes(self) -> int:
        """K."""
        return self.top_k

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

    def assigned_rank(self, declared: int | None) -> int | None:
        """`rank_for`, None where that is the run's."""
        rank = self.rank_for(declared)
        return rank if rank != self.proxy_lora.rank else None

    @model_validator(mode="after")
    def _a_frozen_proxy_is_not_factored_anew(self) -> Self:
        # Singular values give other factors of the same product: theta would not stay what it was.
        if self.freeze_proxy and self.aggregation != "fedavg":
            raise ValueError(f"`freeze_proxy` goes with `aggregation` fedavg, got {self.aggregation}")
        return self

    @model_validator(mode="after")
    def _mutual_learning_has_a_teacher_in_place_of_smoothing(self) -> Self:
        if self.training.label_smoothing:
            raise ValueError(
                f"expected `training.label_smoothing` 0 in mutual learning, got {self.training.label_smoothing:g}"
            )
        return self

    @model_validator(mode="after")
    def _one_likelihood_term(self) -> Self:
        if self.span_likelihood_weight and self.matching != "fold":
            raise ValueError(
                "expected span_likelihood_weight 0, or matching 'fold' which alone takes that term; "
                f"got {self.span_likelihood_weight} beside {self.matching!r}"
            )
        return self


CO_PLMS = StrategySpec(
    settings=CoPlmsSettings,
    steps="cotuning.strategies.co_plms:CoPlms",
    uploads=frozenset({PartKind.ADAPTER_DELTA, PartKind.LOGITS}),
    downloads=frozenset({DownloadKind.PROXY_BASE, DownloadKind.ADAPTER, DownloadKind.PROBE_SET}),
    small_model=SmallModel.DISTILLED_PROXY,
    public_set=PublicSet.SERVER_AND_DEVICES,
    trains_llm=True,
)
