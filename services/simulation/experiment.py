"""A whole experiment: every strategy with every seed, each result kept as soon as it is there.

What is there already is not played again, so an interrupted experiment goes on with the run that it was in.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cotuning.examples import Example
from cotuning.training import TrainingDiverged
from protocol.strategies import spec_of
from simulation.base_models import BaseModels
from simulation.budget import Crossing, Meter
from simulation.cache import ResultCache
from simulation.errors import RoundFailed
from simulation.measuring import measure_base, measure_round, measure_run
from simulation.participation import plan_rounds
from simulation.prepared import prepare
from simulation.rounds import Run, Version
from simulation.run_results import RoundScores, RunKey, RunResult
from simulation.settings import BEFORE, Entry
from simulation.setup import Device, Experiment
from simulation.wire import crossing

OnProgress = Callable[[str, int, int], None]
"""Told what is being done, and how many of how many steps or rows of it are."""


@dataclass(frozen=True)
class Listener:
    """Who is told how far an experiment is. By default nobody.

    Attributes:
        on_run: a run begins, or its result was found.
        on_progress: within a run.
    """

    on_run: Callable[[RunKey, bool], None] = lambda key, found: None
    on_progress: OnProgress = lambda what, done, total: None


def run_experiment(experiment: Experiment, cache_folder: Path, listener: Listener | None = None) -> list[RunResult]:
    """Play what is missing and return every result: the base models', then each strategy's, seed by seed.

    Args:
        experiment: from `setup.set_up`.
        cache_folder: results and distilled proxies stay here.
        listener: told how far it is.

    Raises:
        CacheError: a kept result cannot be used; before anything trains.
        SetupError: a model cannot be loaded; likewise.
        RoundFailed: a strategy cannot be played with these models and rows; what was done before is kept.
    """
    listener = listener or Listener()
    known = {key: (cache, cache.read(key)) for key, cache, _ in _runs(experiment, cache_folder)}
    models = BaseModels(experiment.settings.llm_loading)
    torch.set_num_threads(experiment.settings.threads)
    if any(result is None for _, result in known.values()):
        _load_all(experiment, models)
    results = []
    for key, cache, entry in _runs(experiment, cache_folder):
        result = known[key][1]
        listener.on_run(key, result is not None)
        if result is None:
            result = _play(experiment, entry, key, models, cache_folder / "proxies", listener)
            cache.write(result)
        results.append(result)
    return results


def missing_runs(experiment: Experiment, cache_folder: Path) -> list[RunKey]:
    """Runs that have no result yet. Raises CacheError as `run_experiment`."""
    return [key for key, cache, _ in _runs(experiment, cache_folder) if cache.read(key) is None]


def _runs(experiment: Experiment, folder: Path) -> Iterator[tuple[RunKey, ResultCache, Entry | None]]:
    for seed in experiment.devices:
        for entry in (None, *experiment.settings.strategies):
            label = BEFORE if entry is None else entry.label
            key = RunKey(strategy=label, seed=seed, checkpoint=experiment.settings.checkpoint)
            yield key, ResultCache(folder, experiment.configuration(entry, seed)), entry


def _load_all(experiment: Experiment, models: BaseModels) -> None:
    if experiment.settings.llm is not None:
        models.llm(experiment.settings.llm)
    for source in experiment.settings.slms:
        models.slm(source)


def _play(
    experiment: Experiment, entry: Entry | None, key: RunKey, models: BaseModels, proxies: Path, listener: Listener
) -> RunResult:
    devices, settings = experiment.devices[key.seed], experiment.settings
    llm = models.llm(settings.llm) if settings.llm is not None else None
    own = {device.name: device.rows.test_set for device in devices}
    if entry is None:
        meter = Meter(Crossing())
        with meter.stage("measurement"):
            scores = measure_base(
                devices, models, llm, settings.evaluation, transfer=settings.transfer, on_measured=listener.on_progress
            )
        return RunResult(key=key, own=own, scores=scores, cost=meter.cost())
    try:
        run, rounds = _played(experiment, entry, key.seed, models, proxies, listener)
    except (RoundFailed, TrainingDiverged) as error:
        raise RoundFailed(f"{key}: {error}") from error
    with run.meter.stage("measurement"):
        scores = measure_run(
            run, settings.evaluation, transfer=settings.transfer, llm=llm, on_measured=listener.on_progress
        )
    return RunResult(key=key, own=own, scores=scores, rounds=rounds, cost=run.meter.cost(), notes=tuple(run.notes))


def begin(
    experiment: Experiment, entry: Entry, seed: int, models: BaseModels, proxies: Path, listener: Listener
) -> Run:
    """A run of a strategy with all that round 1 needs.

    Args:
        experiment: whose devices and settings.
        entry: the strategy.
        seed: of the run.
        models: the base models.
        proxies: folder in which distilled proxies stay.
        listener: told how far it is.

    Raises:
        SetupError: the proxy's settings do not fit the LLM.
        TrainingDiverged: the proxy's distillation came to no number.
    """
    meter = Meter(crossing(spec_of(entry.settings)))
    prepared = prepare(
        experiment,
        entry.settings,
        models,
        seed,
        folder=proxies,
        meter=meter,
        on_progress=lambda stage, step, steps, _: listener.on_progress(f"proxy: {stage}", step, steps),
    )
    devices = experiment.devices[seed]
    run = Run(
        settings=entry.settings,
        devices=devices,
        pooled=_pooled(devices) if entry.rows == "pooled" else {},
        models=models,
        prepared=prepared,
        seed=seed,
        tolerance=experiment.settings.evaluation.tolerance_bits_per_byte,
        meter=meter,
        on_progress=lambda who, stage, step, steps: listener.on_progress(f"{who}: {stage}", step, steps),
    )
    if "seconds" in prepared.distilled:
        run.notes.append(
            f"the proxy's distillation, {prepared.distilled['seconds']:.1f} s, is shared by all strategies"
        )
    return run


def _played(
    experiment: Experiment, entry: Entry, seed: int, models: BaseModels, proxies: Path, listener: Listener
) -> tuple[Run, tuple[RoundScores, ...]]:
    run = begin(experiment, entry, seed, models, proxies, listener)
    settings, dealt = experiment.settings, experiment.settings.devices
    plans = plan_rounds(
        len(run.devices),
        settings.rounds,
        share=dealt.share,
        drop_out=dealt.drop_out,
        fewest=dealt.fewest,
        seed=seed,
    )
    rounds: list[RoundScores] = []

    def on_version(version: Version) -> None:
        if settings.measure_rounds:
            with run.meter.stage("measurement"):
                rounds.append(measure_round(run, version.number, settings.evaluation, listener.on_progress))

    run.play(plans, on_version)
    return run, tuple(rounds)


def _pooled(devices: Sequence[Device]) -> dict[str, Sequence[Example]]:
    together = [row for device in devices for row in device.rows.train]
    return dict.fromkeys((device.name for device in devices), together)
