"""Each device by itself: psi_i on D_i by cross-entropy. The baseline that co-tuning has to beat."""

from cotuning.strategies.interface import DeviceInputs, StrategySteps
from cotuning.strategies.local_tuning import tune_on_private_rows
from cotuning.strategies.results import DeviceResult
from protocol.strategies import StandaloneSettings

STAGE = "standalone_tuning"


class Standalone(StrategySteps[StandaloneSettings]):
    """Each device by itself; the server has nothing to do."""

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """Train psi_i on the private rows for one round; nothing but numbers leaves."""
        tuned, losses = tune_on_private_rows(given, self.settings, start=given.slm_adapter, stage=STAGE)
        return DeviceResult(slm_adapter=tuned, num_examples=len(given.private), losses=losses)
