"""A whole experiment: every strategy with every seed, each result kept as soon as it is there.

What is there already is not played again, so an interrupted experiment goes on with the run that it was in.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cotuning.training import TrainingDiverged
from protocol.strategies import spec_of
from simulation.base_models import BaseModels
from simulation.budget import Crossing, Meter
from simulation.cache import ResultCache
from simulation.errors import RoundFailed
from simulation.measuring import ModelScores, measure_base, measure_round, measure_run
from simulation.participation import RoundPlan, plan_rounds
from simulation.prepared import prepare
from simulation.rounds import Run, Version
from simulation.run_results import RoundScores, RunKey, RunResult
from simulation.settings import BEFORE, Entry, SimulationSettings
from simulation.setup import Experiment
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


def run_experiment(
    experiment: Experiment, cache_folder: Path, listener: Listener | None = None, models: BaseModels | None = None
) -> list[RunResult]:
    """Play what is missing and return every result: the base models', then each strategy's, seed by seed.

    Args:
        experiment: from `setup.set_up`.
        cache_folder: results and distilled proxies stay here.
        listener: told how far it is.
        models: the base models; loaded when they are needed.

    Raises:
        CacheError: a kept result cannot be used; before anything trains.
        SetupError: a model cannot be loaded; likewise.
        RoundFailed: a strategy cannot be played with these models and rows; what was done before is kept.
    """
    listener = listener or Listener()
    known = {key: (cache, cache.read(key)) for key, cache, _ in _runs(experiment, cache_folder)}
    torch.set_num_threads(experiment.settings.threads)
    models = models or BaseModels(experiment.settings.llm_loading)
    player = Player(experiment, models, cache_folder / "proxies", listener)
    if any(result is None for _, result in known.values()):
        _load_all(experiment, player.models)
    results = []
    for key, _, entry in _runs(experiment, cache_folder):
        cache, result = known[key]
        listener.on_run(key, result is not None)
        if result is None:
            result = player.result(key, entry)
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


@dataclass(frozen=True)
class Player:
    """Plays runs of an experiment.

    Attributes:
        experiment: whose devices and settings.
        models: the base models.
        proxies: folder in which distilled proxies stay.
        listener: told how far it is.
    """

    experiment: Experiment
    models: BaseModels
    proxies: Path
    listener: Listener = field(default_factory=Listener)

    def result(self, key: RunKey, entry: Entry | None) -> RunResult:
        """Play a run and measure it; None: the base models.

        Raises:
            SetupError: the proxy's settings do not fit the LLM.
            RoundFailed: the strategy cannot be played with these models and rows.
        """
        settings, own = self._settings, {each.name: each.rows.test_set for each in self.experiment.devices[key.seed]}
        if entry is None:
            meter = Meter(Crossing())
            with meter.stage("measurement"):
                scores = self._base_scores(key.seed)
            return RunResult(key=key, own=own, scores=scores, cost=meter.cost())
        try:
            run = self.begin(entry, key.seed)
            rounds = self._rounds(run)
        except (RoundFailed, TrainingDiverged) as error:
            raise RoundFailed(f"{key}: {error}") from error
        with run.meter.stage("measurement"):
            scores = measure_run(run, settings, self.listener.on_progress)
        cost, notes = run.meter.cost(), tuple(run.notes)
        return RunResult(key=key, own=own, scores=scores, rounds=rounds, cost=cost, notes=notes)

    def begin(self, entry: Entry, seed: int) -> Run:
        """A run of a strategy with all that round 1 needs.

        Raises:
            SetupError: the proxy's settings do not fit the LLM.
            TrainingDiverged: the proxy's distillation came to no number.
        """
        meter, tell = Meter(crossing(spec_of(entry.settings))), self.listener.on_progress
        prepared = prepare(
            self.experiment,
            entry,
            self.models,
            seed,
            folder=self.proxies,
            meter=meter,
            on_progress=lambda stage, step, steps, _: tell(f"proxy: {stage}", step, steps),
        )
        run = Run(
            settings=entry.settings,
            devices=self.experiment.devices[seed],
            models=self.models,
            prepared=prepared,
            seed=seed,
            tolerance=self._settings.evaluation.tolerance_bits_per_byte,
            meter=meter,
            on_progress=lambda who, stage, step, steps: tell(f"{who}: {stage}", step, steps),
        )
        if "seconds" in prepared.distilled:
            seconds = prepared.distilled["seconds"]
            run.notes.append(f"the proxy's distillation, {seconds:.1f} s, is shared by all strategies with it")
        return run

    @property
    def _settings(self) -> SimulationSettings:
        return self.experiment.settings

    def plans(self, seed: int) -> list[RoundPlan]:
        """Who takes part in each round: the same for every strategy."""
        dealt = self._settings.devices
        return plan_rounds(
            len(self.experiment.devices[seed]),
            self._settings.rounds,
            share=dealt.share,
            drop_out=dealt.drop_out,
            fewest=dealt.fewest,
            seed=seed,
        )

    def _rounds(self, run: Run) -> tuple[RoundScores, ...]:
        rounds: list[RoundScores] = []

        def on_version(version: Version) -> None:
            if self._settings.measure_rounds:
                with run.meter.stage("measurement"):
                    found = measure_round(run, version.number, self._settings, self.listener.on_progress)
                rounds.append(found)

        run.play(self.plans(run.seed), on_version)
        return tuple(rounds)

    def _base_scores(self, seed: int) -> ModelScores:
        settings = self._settings
        return measure_base(
            self.experiment.devices[seed],
            self.models,
            self.models.llm(settings.llm) if settings.llm is not None else None,
            settings,
            self.listener.on_progress,
        )
