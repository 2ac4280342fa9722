"""Every strategy by name: the ones that are built in, and those that installed distributions add.

A distribution adds one by an entry point of the group `cotune.strategies` whose value is a `StrategySpec`:

    [project.entry-points."cotune.strategies"]
    my_strategy = "my_strategy:SPEC"

It is looked up when a process starts, so everybody who meets a run of it (the API, the workers, the devices) must have
it installed. Its module is imported by processes that have no torch, so it imports torch in its steps only.
"""

import sys
from collections.abc import Iterable
from functools import reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from protocol.strategies.centralized import CENTRALIZED
from protocol.strategies.co_plms import CO_PLMS
from protocol.strategies.data_based import DATA_BASED
from protocol.strategies.feature_based import FEATURE_BASED
from protocol.strategies.fed_lora import FED_LORA
from protocol.strategies.fedcollm import FEDCOLLM
from protocol.strategies.fedmkt import FEDMKT
from protocol.strategies.settings import StrategySettings
from protocol.strategies.spec import StrategySpec
from protocol.strategies.standalone import STANDALONE

ENTRY_POINT_GROUP = "cotune.strategies"
BUILT_IN = (CENTRALIZED, CO_PLMS, DATA_BASED, FEATURE_BASED, FED_LORA, FEDCOLLM, FEDMKT, STANDALONE)


class StrategyNotUsable(ValueError):
    """An installed distribution offers as a strategy what is none; the message names the entry point."""


def collect(entries: Iterable[EntryPoint]) -> dict[str, StrategySpec]:
    """The built-in strategies and those that `entries` add, by name.

    Raises:
        StrategyNotUsable: what an entry point names cannot be imported, imports torch at once, is no `StrategySpec`, or
            has the name of another strategy.
    """
    specs = {spec.name: spec for spec in BUILT_IN}
    for entry in sorted(entries, key=lambda each: each.name):
        spec = _load(entry)
        if spec.name in specs:
            raise _not_usable(entry, f"a name that no other strategy has, got {spec.name!r}")
        specs[spec.name] = spec
    return specs


def _load(entry: EntryPoint) -> StrategySpec:
    had_torch = "torch" in sys.modules
    try:
        spec: Any = entry.load()
    except Exception as error:  # foreign code: whatever it raises, the message must say whose it is
        raise _not_usable(entry, f"a module that can be imported, got {type(error).__name__}: {error}") from error
    if not had_torch and "torch" in sys.modules:
        raise _not_usable(entry, "a module that imports torch in its steps only: the API has none; it did at once")
    if not isinstance(spec, StrategySpec):
        raise _not_usable(entry, f"a StrategySpec, got {type(spec).__name__}")
    return spec


def _not_usable(entry: EntryPoint, expected: str) -> StrategyNotUsable:
    return StrategyNotUsable(f"entry point {entry.name} = {entry.value} of {ENTRY_POINT_GROUP}: expected {expected}")


STRATEGIES: dict[str, StrategySpec] = collect(entry_points(group=ENTRY_POINT_GROUP))
"""Every strategy by name. The API validates against it without importing torch."""

if TYPE_CHECKING:
    Strategy = StrategySettings
else:
    Strategy = Annotated[
        reduce(or_, (spec.settings for spec in STRATEGIES.values())),
        Field(discriminator="name"),
    ]
"""The settings of any strategy; `name` says of which."""


def spec_of(settings: StrategySettings) -> StrategySpec:
    """The spec of the strategy whose settings these are."""
    return STRATEGIES[settings.name]
