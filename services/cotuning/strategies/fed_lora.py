"""Federated LoRA (FedIT, arXiv 2305.05644): the same SLM everywhere, devices tune one shared adapter, the server
averages it.

theta is the SLM's adapter psi itself. A device goes on from the shared one in every round and keeps what it made of it
for its own use only; the weighted mean (FedAvg, arXiv 1602.05629) is the interface's default, and so is the server's
step: it publishes that mean.
"""

from cotuning.adapters import subtract
from cotuning.strategies.interface import DeviceInputs, StrategySteps
from cotuning.strategies.local_tuning import tune_on_private_rows
from cotuning.strategies.results import DeviceResult
from protocol.strategies import AveragingSettings, FedLoraSettings

STAGE = "shared_tuning"


def tune_shared_adapter(given: DeviceInputs, settings: AveragingSettings) -> DeviceResult:
    """Train the shared adapter of the device's own SLM on the private rows by cross-entropy.

    Raises:
        AdapterMismatch: theta is not of this device's model and these settings.
        TrainingDiverged: see `training.train`.
    """
    assert given.shared_adapter is not None
    tuned, losses = tune_on_private_rows(given, settings, start=given.shared_adapter, stage=STAGE)
    return DeviceResult(
        delta=subtract(tuned, given.shared_adapter),
        slm_adapter=tuned,
        num_examples=len(given.private),
        losses=losses,
    )


class FedLora(StrategySteps[FedLoraSettings]):
    """Devices tune the shared adapter, the server averages."""

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """Go on from the shared adapter; what this device made of it in the last round is in there already."""
        return tune_shared_adapter(given, self.settings)
