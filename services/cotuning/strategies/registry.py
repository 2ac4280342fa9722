"""From a run's settings to the strategy's steps. Imports the strategy's code, and with it torch."""

from importlib import import_module
from typing import Any

from cotuning.strategies.interface import StrategySteps
from protocol.strategies import StrategySettings, spec_of


class StepsNotUsable(TypeError):
    """What a strategy's spec names does not make its steps."""


def steps_of(settings: StrategySettings) -> StrategySteps[Any]:
    """The steps of the strategy whose settings these are.

    Raises:
        StepsNotUsable: the spec names what is not there, or makes something else.
    """
    spec = spec_of(settings)
    module, _, name = spec.steps.partition(":")
    make = getattr(import_module(module), name, None)
    made = make(settings) if callable(make) else make
    if not isinstance(made, StrategySteps):
        raise StepsNotUsable(f"strategy {spec.name}: expected {spec.steps} to make StrategySteps, got {made!r}")
    return made
