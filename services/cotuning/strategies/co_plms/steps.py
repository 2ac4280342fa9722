"""Co-PLMs as a strategy: what of a round's inputs its two steps take."""

from collections.abc import Sequence
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
        assert given.shared_model is not None
        assert given.shared_adapter is not None
        start = device_start(
            self.settings, given.adapter_rank, given.shared_adapter, given.domain_adapter, seed=given.seed
        )
        return device_step(
            slm=given.slm,
            proxy=given.shared_model,
            private=given.private,
            probe=given.probe,
            shared_adapter=start.shared_adapter,
            domain_adapter=start.domain_adapter,
            slm_adapter=given.slm_adapter,
            settings=start.settings,
            round_number=given.round_number,
            seed=given.seed,
            on_progress=given.on_progress,
            checkpoints=given.checkpoints,
        )

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
        assert given.llm is not None
        assert given.shared_model is not None
        assert given.shared_adapter is not None
        return server_step(
            llm=given.llm,
            proxy=given.shared_model,
            public=given.public,
            probe=given.probe,
            shared_adapter=given.shared_adapter,
            llm_adapter=given.llm_adapter,
            device_logits=given.device_logits,
            settings=self.settings,
            round_number=given.round_number,
            seed=given.seed,
            on_progress=given.on_progress,
            checkpoints=given.checkpoints,
        )
