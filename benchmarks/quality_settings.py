"""A size of the benchmark of quality, as data: base models, and two experiments of one list of strategies each.

`quality_presets/heterogeneous.toml` and `homogeneous.toml` say which strategies are compared, and what each takes away;
they are the same at every size. `tiny.toml`, `small.toml` and `medium.toml` say how large: rows, rounds, steps, seeds,
the recipe of the base models, and the hyper-parameters of each strategy; so does `facts.toml`, of the demo's domains,
which the project makes for itself. `llm`, `slms` and the `path` of a proxy name models of the recipe.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from command_line.base_model_recipes import PRESETS as RECIPES
from command_line.base_model_recipes import BaseModelsRecipe, preset, read_recipe, with_precision
from command_line.errors import BadInput
from protocol.base import SettingsModel
from simulation.settings import SimulationSettings, merged, settings_of

FOLDER = Path(__file__).parent / "quality_presets"
SETTINGS = ("heterogeneous", "homogeneous")
"""Small models of several architectures and tokenizers; one small model everywhere."""

OTHERS = "others"
"""In a search: strategies that it does not name."""


class Setting(SettingsModel):
    """What one of the two experiments has of its own."""

    slms: list[str]
    skip: list[str] = Field(default=[])
    """Labels of its list that are not played at this size."""
    experiment: dict[str, Any] = Field(default={})


class Size(SettingsModel):
    """What a file of a size holds."""

    seeds: int = Field(ge=1, le=1000)
    recipe: str
    """Of the base models: a preset of `cotune pretrain`, or a file by its path from this one."""
    corpus: str
    """In the data folder: what the base models read beside the pool of public rows."""
    chosen: str
    """How the hyper-parameters were chosen, for the page."""
    experiment: dict[str, Any]
    """Fields of both experiments (docs/simulation.md)."""
    heterogeneous: Setting
    homogeneous: Setting
    generated: bool = False
    """Whether the data are the domains that the project makes for itself; else a data folder is given."""
    tasks: list[str] = Field(default=[])
    """Where given: each of these tasks of the data folder is a domain, and there are no other rows or documents."""
    public_pool: bool = False
    """With `tasks`: rows of these tasks in the large pool are public rows too, not only what base models read."""
    processes: int | None = Field(default=None, ge=1)
    """Runs at the same time; by default one for each core, as far as each has the threads of the experiment."""
    base_seeds: list[int] = Field(default=[0], min_length=1)
    """A set of base models each; every strategy is played with each."""
    strategies: dict[str, dict[str, Any]] = Field(default={})
    """Hyper-parameters by the strategy's name, its ablations and controls among them."""
    labels: dict[str, dict[str, Any]] = Field(default={})
    """Those of one entry alone."""
    search: dict[str, list[dict[str, Any]]] = Field(default={})
    """For `benchmarks.quality_search`: a strategy's name, or `OTHERS`, -> settings that are tried; as many for each."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.public_pool and not self.tasks:
            raise ValueError("expected `tasks` where `public_pool` is true, got none")
        if len({len(points) for points in self.search.values()}) > 1:
            told = ", ".join(f"{name} {len(points)}" for name, points in self.search.items())
            raise ValueError(f"expected `search` to try each strategy as often, got {told}")
        return self


@dataclass(frozen=True)
class Preset:
    """A size with what it names.

    Attributes:
        name: of the size.
        size: as read.
        recipe: of the base models.
        tables: setting -> the experiment as TOML would give it, models by their names in the recipe.
    """

    name: str
    size: Size
    recipe: BaseModelsRecipe
    tables: Mapping[str, Mapping[str, Any]]

    @property
    def model_names(self) -> list[str]:
        """Of the recipe."""
        return [each.name for each in self.recipe.models]

    def recipe_of(self, base_seed: int) -> BaseModelsRecipe:
        """The recipe of one set of base models."""
        return replace(self.recipe, seed=base_seed)

    def settings(self, setting: str, base_seed: int, folders: Mapping[str, Path] | None = None) -> SimulationSettings:
        """An experiment.

        Args:
            setting: one of `SETTINGS`.
            base_seed: names the set of base models.
            folders: model -> where it is; None while it is not there yet: then models are called by their names.

        Raises:
            BadInput: a field is unknown, missing or out of its range, or a model is not of the recipe.
        """
        places = {name: str(folders[name]) if folders else name for name in self.model_names}
        try:
            table = _placed(self.tables[setting], places)
        except KeyError as error:
            raise BadInput(
                f"{self.name}, {setting}: expected models of the recipe, {', '.join(places)}; got {error.args[0]}"
            ) from None
        try:
            return settings_of({**table, "name": f"{self.name} {setting}", "checkpoint": str(base_seed)})
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise BadInput(f"{self.name}, {setting}: expected an experiment, got {told}") from None


def read_preset(source: str) -> Preset:
    """Read a size by its name, or a file of one.

    Raises:
        BadInput: there is no such size, or a file of it cannot be used.
    """
    path = FOLDER / f"{source}.toml"
    if not path.is_file():
        path = Path(source)
    if path.suffix != ".toml" or not path.is_file():
        raise BadInput(f"expected PRESET to be one of {', '.join(sizes())}, or a TOML file; got {source}")
    try:
        size = Size.model_validate(_read(path))
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise BadInput(f"{path}: expected a size of the benchmark, got {told}") from None
    recipe = preset(size.recipe) if size.recipe in RECIPES else read_recipe(path.parent / size.recipe)
    tables = {name: _table(size, getattr(size, name), _read(FOLDER / f"{name}.toml"), recipe) for name in SETTINGS}
    made = Preset(path.stem, size, recipe, tables)
    for name in SETTINGS:
        made.settings(name, size.base_seeds[0])
    return made


def sizes() -> list[str]:
    """Names of the sizes that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.toml") if path.stem not in SETTINGS)


def _read(path: Path) -> dict[str, Any]:
    try:
        return with_precision(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"expected TOML at {path}, got: {error}") from None


def _table(size: Size, own: Setting, listed: Mapping[str, Any], recipe: BaseModelsRecipe) -> dict[str, Any]:
    """The experiment: what the size says, with the strategies of the list that it does not skip."""
    strategies, labels = [], []
    for entry in listed["strategies"]:
        labels.append(entry.get("label", entry["name"]))
        if labels[-1] not in own.skip:
            below = merged(size.strategies.get(entry["name"], {}), size.labels.get(labels[-1], {}))
            strategies.append(_shaped(merged(below, entry), size.experiment.get("proxy", {}), recipe))
    if unknown := set(own.skip) - set(labels):
        raise BadInput(f"expected `skip` among {', '.join(labels)}; got {', '.join(sorted(unknown))}")
    table = merged(size.experiment, own.experiment)
    return table | {"llm": recipe.llm.name, "slms": own.slms, "strategies": strategies}


def _shaped(entry: dict[str, Any], usual: Mapping[str, Any], recipe: BaseModelsRecipe) -> dict[str, Any]:
    """A proxy that is not the experiment's: of the recipe's proxy's shape, and read as the experiment's is."""
    if "proxy" not in entry:
        return entry
    reading = {name: usual[name] for name in ("batch_size", "max_length", "precision") if name in usual}
    shape: dict[str, Any] = {}
    if entry["proxy"].get("source") == "config" and recipe.proxy is not None:
        shape = {"layers": recipe.proxy.layers, "hidden_size": recipe.proxy.hidden_size}
    return entry | {"proxy": reading | shape | entry["proxy"]}


def _placed(table: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """The table with models by where they are."""

    def proxy(given: Mapping[str, Any]) -> dict[str, Any]:
        return {**given, "path": places[given["path"]]} if "path" in given else dict(given)

    def with_proxy(given: Mapping[str, Any]) -> dict[str, Any]:
        return {**given, "proxy": proxy(given["proxy"])} if "proxy" in given else dict(given)

    strategies: Sequence[Mapping[str, Any]] = table["strategies"]
    return {
        **with_proxy(table),
        "llm": places[table["llm"]],
        "slms": [places[each] for each in table["slms"]],
        "strategies": [with_proxy(each) for each in strategies],
    }
