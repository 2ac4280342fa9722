"""All rows in one place: the upper bound that federated strategies are measured against."""

from typing import Literal

from protocol.strategies.settings import StrategySettings
from protocol.strategies.spec import PrivateRows, StrategySpec


class CentralizedSettings(StrategySettings):
    """Each SLM is tuned on the rows of all devices together. In simulations only: here private rows would have to leave
    their devices."""

    name: Literal["centralized"] = "centralized"


CENTRALIZED = StrategySpec(
    settings=CentralizedSettings,
    steps="cotuning.strategies.centralized:Centralized",
    private_rows=PrivateRows.POOLED,
)
