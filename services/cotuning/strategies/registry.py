"""From a run's settings to the strategy's steps. Imports the strategy's code, and with it torch."""

from importlib import import_module
from typing import Any

from cotuning.strategies.interface import StrategySteps
from protocol.strategies import StrategySettings, spec_of


class StepsNotUsable(TypeError):
    """What a strategy's spec names as its steps is no such class."""


def steps_of(settings: StrategySettings) -> StrategySteps[Any]:
    """The steps of the strategy whose settings these are.

    Raises:
        StepsNotUsable: the spec names a class that is none.
    """
    spec = spec_of(settings)
    module, _, name = spec.steps.partition(":")
    made = getattr(import_module(module), name, None)
    if not (isinstance(made, type) and issubclass(made, StrategySteps)):
        raise StepsNotUsable(f"strategy {spec.name}: expected a class of StrategySteps at {spec.steps}, got {made!r}")
    return made(settings)
