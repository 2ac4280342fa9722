"""FedMKT as a strategy; its logits travel as messages."""

from cotuning.strategies.fedmkt.device import device_step, last_transfer
from cotuning.strategies.fedmkt.server import check_message, server_step
from cotuning.strategies.interface import DeviceInputs, DeviceMessage, ServerInputs, StrategySteps
from cotuning.strategies.results import DeviceResult, ServerResult
from protocol.strategies import FedMktSettings


class FedMkt(StrategySteps[FedMktSettings]):
    """Logits on the probe set, both ways."""

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """As `device.device_step`."""
        return device_step(given, self.settings)

    def last_step(self, given: DeviceInputs) -> DeviceResult | None:
        """As `device.last_transfer`."""
        return last_transfer(given, self.settings)

    def check_message(self, sent: DeviceMessage, given: ServerInputs) -> None:
        """As `server.check_message`."""
        check_message(sent, given, self.settings)

    def server_step(self, given: ServerInputs) -> ServerResult:
        """As `server.server_step`."""
        return server_step(given, self.settings)
