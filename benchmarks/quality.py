"""Quality: co_plms against the other strategies, its ablations and controls, on a data folder, with base models trained
here. See README.md, docs/quality.md and docs/simulation.md.

Everything that can be wrong is looked at before anything trains; everything that is done is kept, so that an
interrupted benchmark goes on where it was.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from assets.atomic import write_atomically
from benchmarks.quality_base_models import build, check_built, text_of
from benchmarks.quality_data import data_of
from benchmarks.quality_page import Built, Made, page
from benchmarks.quality_settings import SETTINGS, Preset, read_preset, sizes
from command_line import folders
from command_line.base_models import SUMMARY_FILE, PretrainingText
from command_line.errors import BadInput, CommandError
from command_line.exit_codes import ExitCode
from command_line.interruption import Interrupted, interruption
from command_line.live_view import View, view
from command_line.output import print_error
from command_line.simulate_command import play, told_as_command_errors, told_gates
from simulation.base_models import BaseModels, hush_transformers
from simulation.figures import write_figures
from simulation.planned import missing_runs
from simulation.report import QualityReport
from simulation.reporting import report_of
from simulation.scores import METRICS
from simulation.settings import SimulationSettings
from simulation.setup import Experiment, check_data, set_up

PAGES = Path(__file__).parent.parent / "docs" / "results"


@dataclass(frozen=True)
class Places:
    """Where things are read and kept.

    Attributes:
        data: the data folder.
        cache: of base models and results.
        out: of the page, its JSON and its figures.
    """

    data: Path
    cache: Path
    out: Path

    @property
    def base_models(self) -> Path:
        """Those of `cotune pretrain` are there too."""
        return self.cache / "base_models"

    @property
    def results(self) -> Path:
        """Those of `cotune simulate` are there too."""
        return self.cache / "simulations"


def options(about: str | None) -> argparse.ArgumentParser:
    """What the commands of this benchmark have in common; `opened` reads it."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("preset", help=f"{', '.join(sizes())}, or a TOML file")
    parser.add_argument("--data", type=Path, help="a data folder; not for a preset that makes its data itself")
    parser.add_argument("--cache", type=Path, help="of base models and results; default: $COTUNE_CACHE")
    return parser


@contextmanager
def opened(preset: Preset, given: argparse.Namespace) -> Iterator[tuple[Places, View]]:
    """Where things are, what is written in the cache too, and who is told; interruptions are told as commands do.

    Raises:
        BadInput: see `data_of`, or the cache cannot be written.
    """
    with (
        interruption(),
        view(Console(stderr=True, highlight=False, emoji=False)) as shown,
        data_of(preset, given.data) as data,
    ):
        cache = folders.prepare(given.cache or folders.cache_folder(), what="the cache", variable="--cache")
        yield Places(data, cache, cache), shown


@contextmanager
def exits() -> Iterator[None]:
    """Exit as `cotune` does, on an error and where it was interrupted."""
    try:
        yield
    except CommandError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except Interrupted:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = options(__doc__)
    parser.add_argument("--out", type=Path, default=PAGES, help="default: docs/results")
    parser.add_argument("--processes", type=int, help="runs at a time; default: one a core, as the preset says")
    given = parser.parse_args(arguments)
    with exits():
        preset = read_preset(given.preset)
        with opened(preset, given) as (places, shown):
            command = f"make bench-quality PRESET={given.preset}" + (f" DATA={given.data}" if given.data else "")
            written = measure(preset, replace(places, out=given.out), shown, command=command, processes=given.processes)
        print(f"written: {written}")


def measure(preset: Preset, places: Places, shown: View, *, command: str, processes: int | None = None) -> Path:
    """Run the benchmark, and return the page.

    Args:
        preset: how large.
        places: where things are.
        shown: told how far it is.
        command: that makes it again.
        processes: in place of the preset's.

    Raises:
        BadInput: something cannot be used, found before anything trains.
        RunFailed: a run failed; the results of the others are kept.
        ProcessFailed: base models could not be built.
    """
    start = time.monotonic()
    hush_transformers()
    with told_as_command_errors():
        text = checked(preset, places, shown)
        built = {
            seed: build(preset.recipe_of(seed), text, places.base_models, shown, command=command)
            for seed in preset.size.base_seeds
        }
        experiments = {
            name: [_experiment(preset, name, seed, models, places) for seed, models in built.items()]
            for name in SETTINGS
        }
        for each in (one for found in experiments.values() for one in found):
            missing_runs(each, places.results)  # every kept result is read: a damaged one is told of now
        reports = {
            name: _played(found, places, shown, command=command, processes=processes or preset.size.processes)
            for name, found in experiments.items()
        }
    reports = {name: _without_folders(report, places.cache) for name, report in reports.items()}
    models = [_built(folder, preset) for folder in next(iter(built.values())).items()]
    read = Made(models, len(text.dropped_documents), sum(map(len, text.dropped_rows)))
    return _written(preset, reports, read, places.out, command=command, seconds=time.monotonic() - start)


def checked(preset: Preset, places: Places, shown: View) -> PretrainingText:
    """Look at everything that can be wrong before base models are trained, and return what these read.

    Raises:
        SetupError, BadInput: what cannot be used, all of an experiment at once.
    """
    if find_spec("matplotlib") is None:
        raise BadInput(
            "expected matplotlib for the figures, which is not installed", next_step="pip install '.[bench]'"
        )
    folders.prepare(places.out, what="the folder of the page", variable="--out")
    settings = [preset.settings(name, preset.size.base_seeds[0]) for name in SETTINGS]
    for each in settings:
        shown.step(f"Looking at the data for {each.name}")
        check_data(each, places.data, _seeds(preset, each))
    hidden = list(dict.fromkeys(name for each in settings for name in each.public.leave_out_domains))
    text = text_of(preset, places.data, hidden, shown)
    check_built(preset, text, places.base_models, max(each.longest_row for each in settings))
    return text


def _seeds(preset: Preset, settings: SimulationSettings) -> range:
    return range(settings.first_seed, settings.first_seed + preset.size.seeds)


def _experiment(preset: Preset, setting: str, base_seed: int, models: Mapping[str, Path], places: Places) -> Experiment:
    settings = preset.settings(setting, base_seed, models)
    return set_up(settings, places.data, _seeds(preset, settings))


def _played(
    experiments: Sequence[Experiment], places: Places, shown: View, *, command: str, processes: int | None
) -> QualityReport:
    """The report of one setting, over all sets of base models."""
    start, gates, runs = time.monotonic(), [], []
    for experiment in experiments:
        settings = experiment.settings
        models = BaseModels(settings.llm_loading)
        gates += told_gates(experiment, places.results, models, shown)
        runs += play(experiment, places.results, models, shown, processes or at_once(settings))
    shown.step("Intervals of the differences")
    seconds = time.monotonic() - start
    return report_of(experiments[0], runs, command=command, gates=gates, seconds=seconds)


def at_once(settings: SimulationSettings) -> int:
    """Runs that the cores can play at the same time."""
    return max(1, (os.cpu_count() or 1) // settings.threads)


def _without_folders(report: QualityReport, cache: Path) -> QualityReport:
    """The report with models by the names of their folders: where they lie on this machine is nobody's business."""

    def named(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {named(key): named(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [named(each) for each in value]
        return re.sub(rf"{re.escape(str(cache))}\S*/", "", value) if isinstance(value, str) else value

    return report.model_copy(update={"configuration": named(report.configuration)})


def _built(named: tuple[str, Path], preset: Preset) -> Built:
    name, folder = named
    recipe = next(each for each in preset.recipe.models if each.name == name)
    return Built(recipe, json.loads((folder / SUMMARY_FILE).read_bytes()))


def _written(
    preset: Preset,
    reports: Mapping[str, QualityReport],
    made: Made,
    out: Path,
    *,
    command: str,
    seconds: float,
) -> Path:
    """Write page, JSON and figures: `quality-<preset>.md`, `.json`, and a folder of that name."""
    name = f"quality-{preset.name}"
    figures = {
        setting: [
            path.relative_to(out).as_posix()
            for path in write_figures(report, out / name / setting, metrics=METRICS, formats=("png",))
        ]
        for setting, report in reports.items()
    }
    content = {
        "preset": preset.name,
        "command": command,
        "base_models": {each.recipe.name: each.summary for each in made.models},
        "settings": {setting: report.model_dump(mode="json") for setting, report in reports.items()},
    }
    write_atomically(out / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    text = page(preset, reports, made, figures, command=command, seconds=seconds)
    write_atomically(out / f"{name}.md", text.encode())
    return out / f"{name}.md"


if __name__ == "__main__":
    main()
