"""Which runs an experiment consists of, which of them are there, and in which order the others can be played."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulation.budget import equal_cpu_steps
from simulation.cache import ResultCache
from simulation.run_results import RunKey, RunResult
from simulation.settings import BEFORE, Entry, SimulationSettings
from simulation.setup import Experiment

DEVICES = "devices"
"""The stage of a run whose processor time is that of its devices."""


@dataclass(frozen=True)
class PlannedRun:
    """A run with where its result is, or will be.

    Attributes:
        key: which run.
        entry: its strategy, with the steps that it takes; None: the base models.
        cache: keeps it.
    """

    key: RunKey
    entry: Entry | None
    cache: ResultCache

    def read(self) -> RunResult | None:
        """Its result, None if there is none yet. Raises CacheError where the file cannot be used."""
        return self.cache.read(self.key)


def stages(settings: SimulationSettings) -> list[list[Entry | None]]:
    """What can be played at once, then what waits for its cost: entries, None for the base models."""
    first = [each for each in settings.strategies if each.equal_cpu_to is None]
    return [[None, *first], [each for each in settings.strategies if each.equal_cpu_to is not None]]


def planned(experiment: Experiment, folder: Path, entries: Iterable[Entry | None]) -> list[PlannedRun]:
    """The runs of entries whose steps are known, seed by seed.

    Args:
        experiment: from `setup.set_up`.
        folder: of the kept results.
        entries: some of it.
    """
    entries = list(entries)
    return [_run(experiment, folder, entry, seed) for seed in experiment.devices for entry in entries]


def with_known_steps(experiment: Experiment, folder: Path, entries: Iterable[Entry | None]) -> list[Entry | None]:
    """The entries, those of equal cost with their steps; without those whose measure is not there yet.

    Raises:
        CacheError: a kept result cannot be used.
        MeasurementError: a strategy whose devices took no time.
    """
    found: list[Entry | None] = []
    for entry in entries:
        if entry is None or entry.equal_cpu_to is None:
            found.append(entry)
        elif (known := _equal_cost(experiment, folder, entry)) is not None:
            found.append(known)
    return found


def _equal_cost(experiment: Experiment, folder: Path, entry: Entry) -> Entry | None:
    settings = experiment.settings
    method = next(each for each in settings.strategies if each.label == entry.equal_cpu_to)
    plain = settings.cpu_measure
    assert plain is not None
    seconds = [_device_seconds(planned(experiment, folder, [each])) for each in (method, plain)]
    if None in seconds:
        return None
    steps = equal_cpu_steps(
        method_cpu_seconds=seconds[0] or 0.0,
        standalone_cpu_seconds=seconds[1] or 0.0,
        standalone_steps=plain.settings.training.steps,
    )
    training = entry.settings.training.model_copy(update={"steps": steps})
    return entry.model_copy(update={"settings": entry.settings.model_copy(update={"training": training})})


def _device_seconds(runs: Sequence[PlannedRun]) -> float | None:
    """Processor time of the devices, the mean of the runs; None where one is missing."""
    results = [each.read() for each in runs]
    seconds = [each.cost.cpu_seconds.get(DEVICES, 0.0) for each in results if each is not None]
    return sum(seconds) / len(seconds) if len(seconds) == len(results) else None


def _run(experiment: Experiment, folder: Path, entry: Entry | None, seed: int) -> PlannedRun:
    label = BEFORE if entry is None else entry.label
    key = RunKey(strategy=label, seed=seed, checkpoint=experiment.settings.checkpoint)
    return PlannedRun(key, entry, ResultCache(folder, experiment.configuration(entry, seed)))


def missing_runs(experiment: Experiment, cache_folder: Path) -> list[RunKey]:
    """Runs that have no result yet; one whose steps follow from others' cost is missing as long as one of them is.

    Raises:
        CacheError: a kept result cannot be used.
    """
    missing = []
    for entries in stages(experiment.settings):
        known = with_known_steps(experiment, cache_folder, entries)
        missing += [each.key for each in planned(experiment, cache_folder, known) if each.read() is None]
        waiting = {each.label for each in entries if each} - {each.label for each in known if each}
        missing += [
            RunKey(strategy=label, seed=seed, checkpoint=experiment.settings.checkpoint)
            for seed in experiment.devices
            for label in sorted(waiting)
        ]
    return missing
