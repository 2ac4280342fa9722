"""A whole experiment: every strategy with every seed, each result kept as soon as it is there.

What is there already is not played again, so an interrupted experiment goes on with the run that it was in.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from simulation.base_models import BaseModels
from simulation.planned import PlannedRun, missing_runs, planned, stages, with_known_steps
from simulation.player import Listener, Player
from simulation.processes import play_apart
from simulation.run_results import RunResult
from simulation.settings import BEFORE
from simulation.setup import Experiment


def run_experiment(
    experiment: Experiment,
    cache_folder: Path,
    listener: Listener | None = None,
    models: BaseModels | None = None,
    *,
    processes: int = 1,
) -> list[RunResult]:
    """Play what is missing and return every result: the base models', then each strategy's, seed by seed.

    Args:
        experiment: from `setup.set_up`.
        cache_folder: results and distilled proxies stay here.
        listener: told how far it is.
        models: the base models; loaded when they are needed. Other processes load their own.
        processes: that play runs at the same time, each with the experiment's threads; results do not depend on it.

    Raises:
        CacheError: a kept result cannot be used; before anything trains.
        SetupError: a model cannot be loaded; likewise.
        RoundFailed: a strategy cannot be played with these models and rows; what was done before is kept, and with
            several processes what can still be done.
    """
    listener = listener or Listener()
    missing = missing_runs(experiment, cache_folder)
    models = models or BaseModels(experiment.settings.llm_loading)
    player = Player(experiment, models, cache_folder / "proxies", listener)
    if missing and processes == 1:
        torch.set_num_threads(experiment.settings.threads)
        _load_all(experiment, models)
    results: list[RunResult] = []
    for entries in stages(experiment.settings):
        runs = planned(experiment, cache_folder, with_known_steps(experiment, cache_folder, entries))
        if processes == 1:
            _play_here(runs, player)
        else:
            play_apart(runs, player, processes=processes)
        results += [each for run in runs if (each := run.read()) is not None]
    labels = [BEFORE, *(each.label for each in experiment.settings.strategies)]
    return sorted(results, key=lambda each: (each.key.seed, labels.index(each.key.strategy)))


def _play_here(runs: Sequence[PlannedRun], player: Player) -> None:
    for run in runs:
        found = run.read() is not None
        player.listener.on_run(run.key, found)
        if not found:
            run.cache.write(player.result(run.key, run.entry))
            player.listener.on_end(run.key)


def _load_all(experiment: Experiment, models: BaseModels) -> None:
    if experiment.settings.llm is not None:
        models.llm(experiment.settings.llm)
    for source in experiment.settings.slms:
        models.slm(source)
