"""Hyper-parameters by validation rows: the method and every baseline, as many points for each.

Seeds are others than the benchmark's, and where a run would be measured on test rows it is on its devices' validation
rows: no test row is read. Prints what each came to and writes `results/bench_quality_search_<preset>_<setting>.json`;
what is chosen goes into the preset by hand, with how.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from assets.errors import AssetError
from benchmarks.measuring import print_table, write_results
from benchmarks.quality import Places, at_once, checked, exits, opened, options
from benchmarks.quality_base_models import build
from benchmarks.quality_settings import OTHERS, SETTINGS, Preset, read_preset
from command_line.errors import BadInput, RunFailed
from command_line.live_view import View
from command_line.simulate_command import play
from simulation.base_models import BaseModels, hush_transformers
from simulation.errors import RoundFailed, SimulationError
from simulation.run_results import RunResult, device_observations
from simulation.scores import METRICS, Metric
from simulation.settings import Entry, SimulationSettings, merged
from simulation.setup import Experiment, set_up

OTHER_SEEDS = 1000
"""Between the benchmark's first seed and the search's."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, and print what was found."""
    parser = options(__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default=SETTINGS[0])
    parser.add_argument("--seeds", type=int, default=1, help="runs of each point")
    given = parser.parse_args(arguments)
    with exits():
        preset = read_preset(given.preset)
        with opened(preset, given) as (places, shown):
            found = search(preset, given.setting, places, shown, seeds=given.seeds)
    rows = [(each["strategy"], str(each["values"]), *(each[metric] for metric in METRICS)) for each in found]
    print_table(f"{preset.name}, {given.setting}: validation rows", ("strategy", "values", *METRICS), rows)
    write_results(f"quality_search_{preset.name}_{given.setting}", {"found": found})


def search(preset: Preset, setting: str, places: Places, shown: View, *, seeds: int) -> list[dict[str, Any]]:
    """Each strategy at each of its points, the best Rouge-L of a strategy first.

    Args:
        preset: whose `search` says which values.
        setting: one of `SETTINGS`.
        places: where things are; nothing is written to `out`.
        shown: told how far it is.
        seeds: runs of each point.

    Raises:
        BadInput: something cannot be used.
        RunFailed: a run failed; the results of the others are kept.
    """
    hush_transformers()
    try:
        text = checked(preset, places, shown)
        base_seed = preset.size.base_seeds[0]
        models = build(preset.recipe_of(base_seed), text, places.base_models, shown, command="")
        tried = grid(preset.settings(setting, base_seed, models), preset.size.search)
        settings = tried.settings
        experiment = on_validation_rows(
            set_up(settings, places.data, range(settings.first_seed, settings.first_seed + seeds))
        )
        processes = preset.size.processes or at_once(settings)
        runs = play(experiment, places.results, BaseModels(settings.llm_loading), shown, processes)
    except RoundFailed as error:
        raise RunFailed(str(error), next_step="results of the other runs are kept") from None
    except (SimulationError, AssetError) as error:
        raise BadInput(str(error)) from None
    found: list[dict[str, Any]] = [
        {"strategy": name, "values": values} | {metric: _mean(runs, label, metric) for metric in METRICS}
        for label, (name, values) in tried.points.items()
    ]
    return sorted(found, key=lambda each: (each["strategy"], -each["rouge_l"], each["bits_per_byte"]))


@dataclass(frozen=True)
class Grid:
    """What is tried.

    Attributes:
        settings: with an entry for each strategy and point, and no other.
        points: label of an entry -> the strategy's label, and the values.
    """

    settings: SimulationSettings
    points: Mapping[str, tuple[str, dict[str, Any]]]


def grid(settings: SimulationSettings, search: Mapping[str, Sequence[Mapping[str, Any]]]) -> Grid:
    """The method and the baselines at every point of theirs.

    Args:
        settings: of the benchmark.
        search: see `Size.search`.

    Raises:
        BadInput: a strategy has no points, or a field of one cannot be used.
    """
    entries: list[Entry] = []
    points: dict[str, tuple[str, dict[str, Any]]] = {}
    for entry in settings.strategies:
        if entry.kind not in ("method", "baseline"):
            continue
        own = search.get(entry.settings.name, search.get(OTHERS, ()))
        if not own:
            raise BadInput(f"expected the preset to say in `search` what to try of {entry.settings.name}, got nothing")
        for number, point in enumerate(own):
            label = f"{entry.label}.{number}"
            points[label] = (entry.label, dict(point))
            try:
                tried = type(entry.settings).model_validate(merged(entry.settings.model_dump(mode="json"), point))
            except ValidationError as error:
                told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
                raise BadInput(f"search, {entry.settings.name}: expected its settings, got {told}") from None
            entries.append(entry.model_copy(update={"label": label, "kind": "baseline", "settings": tried}))
    changes = {
        "name": f"{settings.name} search",
        "first_seed": settings.first_seed + OTHER_SEEDS,
        "transfer": False,
        "measure_rounds": False,
        "strategies": entries,
    }
    return Grid(settings.model_copy(update=changes), points)


def on_validation_rows(experiment: Experiment) -> Experiment:
    """The experiment with validation rows wherever test rows would be read."""
    devices = {
        seed: [replace(each, rows=replace(each.rows, test=each.rows.validation)) for each in found]
        for seed, found in experiment.devices.items()
    }
    return replace(experiment, devices=devices)


def _mean(runs: Sequence[RunResult], label: str, metric: Metric) -> float:
    values = [scores.mean(metric) for scores in device_observations(runs, label).values()]
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
