"""A strategy of another distribution, whole: federated LoRA whose devices send only the sign of each change."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from protocol.statuses import PartKind
from protocol.strategies import AveragingSettings, DownloadKind, LoraSettings, SmallModel, StrategySpec

if TYPE_CHECKING:
    from cotuning.strategies.interface import StrategySteps


class SignLoraSettings(AveragingSettings):
    """Every device moves each value of the shared adapter by `size`, up or down or not at all."""

    name: Literal["sign_lora"] = "sign_lora"
    size: float = Field(default=0.25, gt=0)

    @property
    def shared_lora(self) -> LoraSettings:
        return self.slm_lora


SPEC = StrategySpec(
    settings=SignLoraSettings,
    steps="sign_lora:make",
    uploads=frozenset({PartKind.ADAPTER_DELTA}),
    downloads=frozenset({DownloadKind.MODEL_MANIFEST, DownloadKind.ADAPTER}),
    small_model=SmallModel.DEVICES_OWN,
)


def make(settings: SignLoraSettings) -> "StrategySteps[SignLoraSettings]":
    """Called where there is torch; this module is imported by the API too, which has none."""
    from cotuning.strategies.fed_lora import tune_shared_adapter
    from cotuning.strategies.interface import DeviceInputs, StrategySteps
    from cotuning.strategies.results import DeviceResult

    class SignLora(StrategySteps[SignLoraSettings]):
        def device_step(self, given: DeviceInputs) -> DeviceResult:
            tuned = tune_shared_adapter(given, self.settings)
            signs = {name: self.settings.size * tensor.sign() for name, tensor in tuned.delta.items()}
            return replace(tuned, delta=signs)

    return SignLora(settings)
