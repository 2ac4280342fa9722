"""Each device by itself: the baseline that co-tuning has to beat."""

from typing import Literal

from protocol.strategies.settings import StrategySettings
from protocol.strategies.spec import StrategySpec


class StandaloneSettings(StrategySettings):
    """Each device tunes its own SLM on its own data (psi_i on D_i by cross-entropy); only numbers leave."""

    name: Literal["standalone"] = "standalone"


STANDALONE = StrategySpec(settings=StandaloneSettings, steps="cotuning.strategies.standalone:Standalone")
