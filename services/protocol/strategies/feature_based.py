"""Feature-based co-tuning: pooled hidden states on the probe rows, in a common space."""

from typing import Literal

from pydantic import Field

from protocol.base import MAX_COUNT
from protocol.part_sizes import most_features_bytes
from protocol.strategies.settings import LoraSettings, ServerSteps, StrategySettings
from protocol.strategies.spec import DownloadKind, MessageKind, PublicSet, StrategySpec


class FeatureBasedSettings(StrategySettings):
    """Feature-based: devices and server draw their models' features of the probe rows towards each other's."""

    name: Literal["feature_based"] = "feature_based"
    llm_lora: LoraSettings = LoraSettings()
    feature_size: int = Field(default=32, ge=1, le=65_536, description="Dimensions of the common space.")
    feature_weight: float = Field(default=1.0, ge=0, description="Of the distance, beside the cross-entropy.")
    distance: Literal["cosine", "mse"] = Field(
        default="cosine", description="Mean of 1 - cosine over rows, or the squared error over the target's own size."
    )
    ridge: float = Field(
        default=0.1,
        gt=0,
        le=1e6,
        description="Of a device's map onto the common space, as a share of its features' mean square a dimension: "
        "the less, the closer the map comes by itself and the less is left to learn.",
    )
    probe_batch_size: int = Field(default=8, ge=1, le=4096, description="Probe rows a step, beside its other rows.")
    max_examples: int = Field(
        default=100_000, ge=1, le=MAX_COUNT, description="Features weigh at most so many examples, whatever they say."
    )
    server: ServerSteps = Field(default=ServerSteps(), description="Of public rows; `max_length` of the probe rows.")

    @property
    def trained_llm_lora(self) -> LoraSettings:
        """omega's."""
        return self.llm_lora

    @property
    def server_steps(self) -> ServerSteps:
        """The LLM learns from the devices' features."""
        return self.server

    def most_message_bytes(self, probe_set_bytes: int) -> int:
        """A vector a row."""
        return most_features_bytes(probe_set_bytes, self.feature_size)


FEATURE_BASED = StrategySpec(
    settings=FeatureBasedSettings,
    steps="cotuning.strategies.feature_based:FeatureBased",
    downloads=frozenset({DownloadKind.PROBE_SET}),
    messages_up=frozenset({MessageKind.SLM_FEATURES}),
    messages_down=frozenset({MessageKind.LLM_FEATURES}),
    public_set=PublicSet.SERVER_AND_DEVICES,
    trains_llm=True,
)
