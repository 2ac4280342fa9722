"""Federated LoRA (FedIT, arXiv 2305.05644): the same small model everywhere, whose adapter the server averages."""

from typing import Literal

from protocol.statuses import PartKind
from protocol.strategies.settings import AveragingSettings, LoraSettings
from protocol.strategies.spec import DownloadKind, SmallModel, StrategySpec


class FedLoraSettings(AveragingSettings):
    """Federated LoRA: every device has the run's `slm` and tunes one shared adapter of it; the server averages it."""

    name: Literal["fed_lora"] = "fed_lora"

    @property
    def shared_lora(self) -> LoraSettings:
        """The SLM's."""
        return self.slm_lora


FED_LORA = StrategySpec(
    settings=FedLoraSettings,
    steps="cotuning.strategies.fed_lora:FedLora",
    uploads=frozenset({PartKind.ADAPTER_DELTA}),
    downloads=frozenset({DownloadKind.MODEL_MANIFEST, DownloadKind.ADAPTER}),
    small_model=SmallModel.DEVICES_OWN,
)
