"""All data together: an SLM's adapter on the rows of every device by cross-entropy. The upper bound, simulated only.

Its spec says `private_rows` pooled: whoever runs it gives as `DeviceInputs.private` all devices' rows, in the order of
the devices. The budget is the same as a device's own, so a comparison with `standalone` is of data and not of steps.
"""

from cotuning.strategies.interface import DeviceInputs, StrategySteps
from cotuning.strategies.local_tuning import tune_on_private_rows
from cotuning.strategies.results import DeviceResult
from protocol.strategies import CentralizedSettings

STAGE = "centralized_tuning"


class Centralized(StrategySteps[CentralizedSettings]):
    """One SLM on all rows; nothing is shared, because everything is."""

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """Go on from the last round's adapter."""
        tuned, losses = tune_on_private_rows(given, self.settings, start=given.slm_adapter, stage=STAGE)
        return DeviceResult(slm_adapter=tuned, num_examples=len(given.private), losses=losses)
