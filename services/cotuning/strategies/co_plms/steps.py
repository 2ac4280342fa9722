"""Co-PLMs as a strategy."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.strategies.co_plms.device import device_step
from cotuning.strategies.co_plms.server import logits_places, parse_logits, server_step
from cotuning.strategies.device_ranks import device_start
from cotuning.strategies.interface import DeviceInputs, LogitsReader, ServerInputs, StrategySteps
from cotuning.strategies.results import DeviceResult, ServerResult
from protocol.strategies import CoPlmsSettings


class CoPlms(StrategySteps[CoPlmsSettings]):
    """DST and SAML on devices, SAML on the server, the devices' logits on public text as one more teacher."""

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """As `device.device_step`, on theta cut to the device's rank."""
        assert given.shared_adapter is not None
        start = device_start(
            self.settings, given.adapter_rank, given.shared_adapter, given.domain_adapter, seed=given.seed
        )
        cut = replace(given, shared_adapter=start.shared_adapter, domain_adapter=start.domain_adapter)
        return device_step(cut, start.settings)

    def logits_reader(self, shared_model: LanguageModel | None, probe: Sequence[Example]) -> LogitsReader:
        """Compares each device's logits with where the proxy's stand on Q."""
        assert shared_model is not None
        places = logits_places(shared_model, probe, self.settings)
        return partial(parse_logits, proxy=shared_model, probe=probe, places=places, settings=self.settings)

    @property
    def learns_from_logits(self) -> bool:
        """Unless the settings switch that teacher off."""
        return self.settings.server.device_teacher != "off"

    def server_step(self, given: ServerInputs) -> ServerResult:
        """As `server.server_step`."""
        return server_step(given, self.settings)
