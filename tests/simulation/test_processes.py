"""Runs played side by side: the same results, one name for what fails, and nothing left running."""

import multiprocessing
import os
import signal
from multiprocessing import get_context, resource_tracker
from pathlib import Path

import pytest

from simulation.cache import ResultCache
from simulation.errors import RoundFailed
from simulation.experiment import run_experiment
from simulation.planned import missing_runs
from simulation.player import Listener
from simulation.processes import _ensure_tracker, _how
from simulation.run_results import RunKey, RunResult
from simulation.setup import Experiment, set_up
from tests.simulation.tiny_world import CO_PLMS, World

ALONE = {"name": "standalone"}
EQUAL_COST = {"name": "standalone", "label": "equal_cost", "kind": "control", "equal_cpu_to": "co_plms"}


@pytest.fixture(scope="module")
def experiment(world: World) -> Experiment:
    strategies = [CO_PLMS, CO_PLMS | {"label": "untaught", "alpha": 0.0}, ALONE]
    return set_up(world.settings(*strategies), world.data, [0, 1])


def test_results_are_those_of_one_process_bit_for_bit(experiment: Experiment, tmp_path: Path) -> None:
    told: list[tuple[str, RunKey]] = []
    said: set[str] = set()
    listener = Listener(
        lambda key, found: told.append(("found" if found else "began", key)),
        lambda key: told.append(("ended", key)),
        lambda what, done, total: said.add(what),
    )
    _ensure_tracker()
    tracker = resource_tracker._resource_tracker._pid
    os.kill(tracker, signal.SIGKILL)  # Others in this process may have ended it, as one did in this suite.
    os.waitpid(tracker, 0)
    apart = run_experiment(experiment, tmp_path / "apart", listener, processes=2)
    here = run_experiment(experiment, tmp_path / "here")
    assert [each.key for each in apart] == [each.key for each in here]
    assert [(each.scores, each.rounds) for each in apart] == [(each.scores, each.rounds) for each in here]
    assert [each.cost.steps for each in apart] == [each.cost.steps for each in here]
    assert {key for what, key in told if what == "began"} == {key for what, key in told if what == "ended"}
    assert len(told) == 2 * 8
    assert {"co_plms, seed 1, checkpoint 0: sum: mutual_learning", "before, seed 0, checkpoint 0: llm on sum"} <= said
    # One proxy a seed, although two strategies asked for it.
    assert len(list((tmp_path / "apart" / "proxies").glob("*/cotune_distillation.json"))) == 2
    assert multiprocessing.active_children() == []
    told.clear()
    assert run_experiment(experiment, tmp_path / "apart", listener, processes=2) == apart
    assert [what for what, _ in told] == ["found"] * 8


def test_what_fails_is_named_and_the_others_are_kept(world: World, tmp_path: Path) -> None:
    hopeless = CO_PLMS | {"label": "hopeless", "max_update_norm": 1e-12}
    experiment = set_up(world.settings(hopeless, ALONE, EQUAL_COST | {"equal_cpu_to": "hopeless"}), world.data, [0, 1])
    with pytest.raises(RoundFailed) as failed:
        run_experiment(experiment, tmp_path, processes=2)
    for seed in (0, 1):
        assert f"hopeless, seed {seed}, checkpoint 0: round 1: " in str(failed.value)
    missing = {(key.strategy, key.seed) for key in missing_runs(experiment, tmp_path)}
    assert missing == {("hopeless", 0), ("hopeless", 1), ("equal_cost", 0), ("equal_cost", 1)}
    assert multiprocessing.active_children() == []


def test_who_stops_the_listener_stops_the_processes(experiment: Experiment, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, tmp_path, Listener(on_progress=stop), processes=2)
    assert multiprocessing.active_children() == []


def test_a_process_that_is_lost_is_told_of(world: World, tmp_path: Path) -> None:
    """Whoever is killed while it plays: the run is named, the rest is played by another process."""
    experiment = set_up(world.settings(CO_PLMS, ALONE), world.data, [0, 1])
    killed: list[int] = []

    def kill_the_first(what: str, done: int, total: int) -> None:
        if not killed and what.startswith("co_plms, seed 0"):
            victim = multiprocessing.active_children()
            killed.extend(each.pid or 0 for each in victim)
            for each in victim:
                each.kill()

    with pytest.raises(RoundFailed, match=r"co_plms, seed 0, checkpoint 0: its process ended by signal 9, as one that"):
        run_experiment(experiment, tmp_path, Listener(on_progress=kill_the_first), processes=2)
    lost = missing_runs(experiment, tmp_path)
    assert RunKey(strategy="co_plms", seed=0) in lost
    assert len(lost) <= len(killed) == 2
    assert {key.strategy for key in lost} <= {"before", "co_plms"}


@pytest.mark.parametrize(
    ("code", "told"), [(-9, "by signal 9, as one that has no memory left"), (-15, "by signal 15"), (1, "with code 1")]
)
def test_how_a_process_ended(code: int, told: str) -> None:
    assert _how(code) == told


def _write_often(folder: Path, result: RunResult) -> None:
    for _ in range(30):
        ResultCache(folder, {}).write(result)


def test_two_writers_of_one_result_leave_a_whole_one(experiment: Experiment, tmp_path: Path) -> None:
    result = run_experiment(set_up_one(experiment), tmp_path / "played")[0]
    writers = [get_context("spawn").Process(target=_write_often, args=(tmp_path / "kept", result)) for _ in range(2)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert [each.exitcode for each in writers] == [0, 0]
    assert ResultCache(tmp_path / "kept", {}).read(result.key) == result
    assert len(list((tmp_path / "kept").glob("*/*"))) == 1


def set_up_one(experiment: Experiment) -> Experiment:
    """The same with the strategy that is soonest played."""
    settings = experiment.settings
    alone = settings.model_copy(update={"strategies": settings.strategies[-1:]})
    return set_up(alone, experiment.folder, [0])
