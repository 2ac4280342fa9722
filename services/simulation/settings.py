"""What an experiment is: devices, base models, rounds and strategies, as one TOML file says it."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from protocol.base import Name, SettingsModel
from protocol.proxy_settings import ProxySettings
from protocol.runs import EvaluationSettings, ModelLoading
from protocol.strategies import STRATEGIES, SmallModel, Strategy, spec_of
from simulation.errors import SetupError

BEFORE = "before"
"""The strategy that trains nothing: how the base models are."""

_OF_AN_ENTRY = ("label", "kind", "about", "proxy", "equal_cpu_to")


class Devices(SettingsModel):
    """Who holds which rows (`simulation.partition`)."""

    domains: list[str] | None = Field(default=None, min_length=1, description="Of the data folder; all by default.")
    per_domain: int = Field(default=1, ge=1, description="Devices a domain, each with rows of it alone.")
    sizes: int | list[int] | None = Field(
        default=None, description="Training rows of each device; by default a domain's are dealt evenly."
    )
    alpha: float | None = Field(
        default=None, gt=0, description="In place of `per_domain`: mixtures of domains by Dirichlet(alpha)."
    )
    count: int | None = Field(default=None, ge=1, description="With `alpha`: devices.")
    size: int | None = Field(default=None, ge=1, description="With `alpha`: training rows a device.")
    ranks: list[int | None] | None = Field(
        default=None, description="`max_adapter_rank` that each device declares; by default none does."
    )
    share: float = Field(default=1.0, gt=0, le=1, description="Of the devices that take part in a round.")
    drop_out: float = Field(default=0.0, ge=0, lt=1, description="Probability that one of them never sends its update.")
    fewest: int = Field(default=1, ge=1, description="Devices whose updates come in any case.")

    @model_validator(mode="after")
    def _one_way_of_dealing(self) -> Self:
        mixed = {"count": self.count, "size": self.size}
        if self.alpha is not None and None in mixed.values():
            raise ValueError(f"`alpha` needs `count` and `size`, got {mixed}")
        if self.alpha is not None and (self.sizes is not None or self.per_domain != 1):
            raise ValueError("`alpha` goes without `per_domain` and `sizes`: it deals rows by `count` and `size`")
        if self.alpha is None and any(each is not None for each in mixed.values()):
            raise ValueError("`count` and `size` are for `alpha`; without it: `per_domain` and `sizes`")
        return self


class Public(SettingsModel):
    """Which rows of `public.jsonl` the server has."""

    leave_out_domains: list[str] = Field(
        default=[], description="Public rows of these domains' tasks are left out: only devices know such rows."
    )


class Entry(SettingsModel):
    """A strategy of the experiment.

    In the file its fields and those of the strategy's settings stand in one table.
    """

    label: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$", description="Unique; by default the strategy's name.")
    kind: Literal["method", "baseline", "control", "ablation", "bound"] = Field(
        default="baseline", description="What it stands for in reports. A control may have a step budget of its own."
    )
    about: str = Field(default="", max_length=200, description="What it is, in a few words.")
    proxy: ProxySettings | None = Field(default=None, description="In place of the experiment's, for controls of it.")
    equal_cpu_to: str | None = Field(
        default=None,
        description="For a control by `standalone`: the label of a strategy. `training.steps` are then as many as "
        "devices can take in the processor time that they spend on that one.",
    )
    settings: Strategy


class SimulationSettings(SettingsModel):
    """An experiment. `[common]` has been dealt to the strategies already."""

    name: Name
    rounds: int = Field(ge=1, le=10_000)
    llm: str | None = Field(default=None, max_length=1024, description="Folder or hub name.")
    slms: list[str] = Field(min_length=1, description="Folders or hub names; dealt to the devices in turn.")
    checkpoint: str = Field(
        default="0", pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$", description="Names this set of base models in results."
    )
    first_seed: int = Field(default=0, ge=0, lt=2**31)
    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads; sums are rounded otherwise with others.")
    llm_loading: ModelLoading = ModelLoading()
    probe_rows: int = Field(default=64, ge=1, le=100_000, description="Public rows that every device receives (Q).")
    devices: Devices = Devices()
    public: Public = Public()
    proxy: ProxySettings = ProxySettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    measured_length: int = Field(
        default=256, ge=16, le=131_072, description="Tokens of a row that is measured; longer ones lose their head."
    )
    transfer: bool | Literal["method"] = Field(
        default=True,
        description="Whether each device's model is measured on every device's rows; `method`: only of strategies of "
        "that kind, and before.",
    )
    measure_rounds: bool = Field(default=False, description="Whether devices are measured after each round.")
    drop_contaminated: bool = Field(
        default=False, description="Leave out public rows that hold a private, validation or test row."
    )
    gates: bool = Field(default=True, description="Whether LLM and proxy are measured before any device trains.")
    strategies: list[Entry] = Field(min_length=1)

    def measures_transfer(self, kind: str) -> bool:
        """Whether each device's model is measured on every device's rows after a strategy of this kind."""
        return self.transfer is True or (self.transfer == "method" and kind in ("method", BEFORE))

    @property
    def longest_row(self) -> int:
        """Tokens that every model must be able to read."""
        lengths = [self.measured_length + self.evaluation.max_new_tokens, self.proxy.max_length if self.llm else 0]
        for each in self.strategies:
            server = each.settings.server_steps
            lengths += [each.settings.training.max_length, server.max_length if server is not None else 0]
        return max(lengths)

    @model_validator(mode="after")
    def _labels_are_unique(self) -> Self:
        labels = [each.label for each in self.strategies]
        if twice := sorted({each for each in labels if labels.count(each) > 1}):
            raise ValueError(f"expected a `label` of its own for each strategy, got {', '.join(twice)} twice")
        if BEFORE in labels:
            raise ValueError(f"expected other labels than {BEFORE!r}: it names the base models")
        return self

    @model_validator(mode="after")
    def _equal_cpu_to_what_is_measured(self) -> Self:
        played = {each.label: each for each in self.strategies if each.equal_cpu_to is None}
        for each in self.strategies:
            if each.equal_cpu_to is None:
                continue
            if (each.kind, each.settings.name) != ("control", "standalone"):
                raise ValueError(
                    f"expected `equal_cpu_to` of a control by standalone, got it of {each.label}, a {each.kind} by "
                    f"{each.settings.name}"
                )
            if each.equal_cpu_to not in played or self.cpu_measure is None:
                raise ValueError(
                    f"expected `equal_cpu_to` of {each.label} to name a strategy that is played, beside a standalone "
                    f"of kind baseline that is; got {each.equal_cpu_to!r} with {', '.join(played) or 'none'}"
                )
        return self

    @property
    def with_the_proxy(self) -> Entry | None:
        """The first strategy with the experiment's own proxy, which stands beside the base models before training."""
        able = (each for each in self.strategies if spec_of(each.settings).small_model is SmallModel.DISTILLED_PROXY)
        return next((each for each in able if each.proxy is None), None)

    @property
    def cpu_measure(self) -> Entry | None:
        """The plain standalone, which tells what a step of it costs."""
        plain = (each for each in self.strategies if each.settings.name == "standalone" and each.kind == "baseline")
        return next(plain, None)

    @model_validator(mode="after")
    def _equal_budgets(self) -> Self:
        budgets = {
            each.label: (each.settings.slm_steps, each.settings.training.batch_size)
            for each in self.strategies
            if each.kind != "control"
        }
        if len(set(budgets.values())) > 1:
            told = ", ".join(f"{label} {steps} steps of {rows} rows" for label, (steps, rows) in budgets.items())
            raise ValueError(f"expected the same budget of a device's SLM a round for each strategy, got {told}")
        return self


def read_settings(path: Path) -> SimulationSettings:
    """Read an experiment from TOML.

    Raises:
        SetupError: no such file, no TOML, or fields that are unknown, missing or out of their range: all of them.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"expected a TOML file at {path}, got: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"{path}: expected TOML, got: {error}") from None
    try:
        return settings_of(table)
    except ValidationError as error:
        problems = "\n".join(f"- {each}" for each in _problems(error, table))
        raise SetupError(f"{path}: {error.error_count()} field(s) cannot be used:\n{problems}") from None


def settings_of(table: Mapping[str, Any]) -> SimulationSettings:
    """Deal `[common]` to the strategies that have its fields, and validate.

    Raises:
        ValidationError: as pydantic finds it.
    """
    common, strategies = table.get("common", {}), table.get("strategies")
    rest = {key: value for key, value in table.items() if key != "common"}
    if isinstance(common, dict) and isinstance(strategies, list):
        rest["strategies"] = [_entry(each, common) for each in strategies]
        # A field that no strategy has is a mistake: left where it is found.
        if unknown := {key: common[key] for key in common if not _known(key)}:
            rest["common"] = unknown
    return SimulationSettings.model_validate(rest)


def _known(field: str) -> bool:
    return any(field in spec.settings.model_fields for spec in STRATEGIES.values())


def _entry(given: Any, common: Mapping[str, Any]) -> Any:
    if not isinstance(given, dict):
        return given
    name = given.get("name")
    spec = STRATEGIES.get(name) if isinstance(name, str) else None
    own = {key: value for key, value in given.items() if key not in _OF_AN_ENTRY}
    dealt = {key: value for key, value in common.items() if spec is not None and key in spec.settings.model_fields}
    about = {key: given[key] for key in _OF_AN_ENTRY if key in given}
    return {"label": name, **about, "settings": merged(dealt, own)}


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables in one; where both have a value that is no table, the one of `above`."""
    both = dict(below)
    for key, value in above.items():
        known = both.get(key)
        both[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return both


def _problems(error: ValidationError, table: Mapping[str, Any]) -> Iterator[str]:
    for each in error.errors():
        place: list[Any] = list(each["loc"])
        if place[:1] == ["strategies"] and len(place) > 1:
            entry = table["strategies"][int(place[1])]
            named = entry.get("label", entry.get("name", place[1])) if isinstance(entry, dict) else place[1]
            # Neither `settings` nor the tag of the union stands in the file.
            hidden = ("settings", entry.get("name") if isinstance(entry, dict) else None)
            place = ["strategies", named, *(part for part in place[2:] if part not in hidden)]
        where = ".".join(map(str, place))
        message = each["msg"].removeprefix("Value error, ")
        shown = "" if each["type"] in ("missing", "value_error") else f", got {each['input']!r:.80}"
        yield f"{where}: {message}{shown}" if where else f"{message}{shown}"
