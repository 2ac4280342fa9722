"""One run of an experiment, from its proxy to its scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cotuning.training import TrainingDiverged
from protocol.strategies import spec_of
from simulation.base_models import BaseModels
from simulation.budget import Crossing, Meter
from simulation.errors import RoundFailed
from simulation.measuring import measure_base, measure_round, measure_run
from simulation.participation import RoundPlan, plan_rounds
from simulation.prepared import Prepared, prepare
from simulation.rounds import Run, Version
from simulation.run_results import LLM, PROXY, RoundScores, RunKey, RunResult
from simulation.settings import Entry, SimulationSettings
from simulation.setup import Experiment
from simulation.wire import crossing

OnProgress = Callable[[str, int, int], None]
"""Told what is being done, and how many of how many steps or rows of it are."""


@dataclass(frozen=True)
class Listener:
    """Who is told how far an experiment is. By default nobody.

    Attributes:
        on_run: a run begins, or its result was found.
        on_end: a run that began is over, and its result kept.
        on_progress: within a run.
    """

    on_run: Callable[[RunKey, bool], None] = lambda key, found: None
    on_end: Callable[[RunKey], None] = lambda key: None
    on_progress: OnProgress = lambda what, done, total: None


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
            return self._before(key, own)
        try:
            run = self.begin(entry, key.seed)
            rounds = self._rounds(run)
        except (RoundFailed, TrainingDiverged) as error:
            raise RoundFailed(f"{key}: {error}") from error
        with run.meter.stage("measurement"):
            transfer = settings.measures_transfer(entry.kind)
            scores = measure_run(run, settings, self.listener.on_progress, transfer=transfer)
        cost, notes = run.meter.cost(), tuple(run.notes)
        return RunResult(key=key, own=own, scores=scores, rounds=rounds, cost=cost, notes=notes)

    def begin(self, entry: Entry, seed: int) -> Run:
        """A run of a strategy with all that round 1 needs.

        Raises:
            SetupError: the proxy's settings do not fit the LLM.
            TrainingDiverged: the proxy's distillation came to no number.
        """
        meter, tell = Meter(crossing(spec_of(entry.settings))), self.listener.on_progress
        prepared = self._prepared(entry, seed, meter)
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
        if entry.equal_cpu_to is not None:
            steps = entry.settings.training.steps
            run.notes.append(f"{steps} steps a round: the processor time of {entry.equal_cpu_to} on its devices")
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

    def _before(self, key: RunKey, own: Mapping[str, str]) -> RunResult:
        """The base models, and the proxy as round 1 finds it where a strategy has the experiment's."""
        settings, meter = self._settings, Meter(Crossing())
        cloud = {LLM: self.models.llm(settings.llm)} if settings.llm is not None else {}
        if settings.with_the_proxy is not None:
            try:
                proxy = self._prepared(settings.with_the_proxy, key.seed, meter).shared_model
            except TrainingDiverged as error:
                raise RoundFailed(f"{key}: {error}") from error
            assert proxy is not None
            cloud[PROXY] = proxy
        with meter.stage("measurement"):
            scores = measure_base(
                self.experiment.devices[key.seed], self.models, cloud, settings, self.listener.on_progress
            )
        return RunResult(key=key, own=own, scores=scores, cost=meter.cost())

    def _prepared(self, entry: Entry, seed: int, meter: Meter) -> Prepared:
        return prepare(
            self.experiment,
            entry,
            self.models,
            seed,
            folder=self.proxies,
            meter=meter,
            on_progress=lambda stage, step, steps, _: self.listener.on_progress(f"proxy: {stage}", step, steps),
        )
