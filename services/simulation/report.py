"""Everything that a benchmark of quality says, as one record: what was measured, what it was made of, what it misses.

`build_report` puts it together from the runs; `markdown.py` and `figures.py` show it, and neither computes anything.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from assets.atomic import write_atomically
from simulation.errors import MeasurementError
from simulation.gates import Gate
from simulation.run_results import LLM, PROXY, RunResult, device_observations, model_observations, runs_of
from simulation.scores import METRICS, Metric, Record, transfer_matrix
from simulation.statistics import DRAWS, Comparison, Interval, best_of, compare, score_interval
from simulation.targets import Target, Wanted, targets

FORMAT: Literal["cotune-quality/1"] = "cotune-quality/1"

Kind = Literal["method", "baseline", "control", "ablation", "bound", "before"]
"""`method`: what claims are about; `baseline`: what it must beat; `control`: where a gain could come from without it;
`ablation`: the method without a part; `bound`: what no device could do; `before`: the base models, untrained."""


class Entry(Record):
    """A strategy in the report."""

    name: str
    kind: Kind
    about: str = Field(description="What it is, in a few words.")


class DeviceFacts(Record):
    """A device: what it holds and what its model is."""

    name: str
    mixture: Mapping[str, int] = Field(description="Domain -> training rows.")
    test_rows: int
    architecture: str = ""
    tokenizer: str = ""
    parameters: int = 0


class MeanCost(Record):
    """What a run of a strategy cost, the mean of its runs; memory: the largest."""

    steps: Mapping[str, float]
    wall_seconds: Mapping[str, float]
    cpu_seconds: Mapping[str, float]
    peak_memory_bytes: Mapping[str, int]
    peak_by_stage: bool
    up: Mapping[str, float]
    down: Mapping[str, float]
    per_device_and_round: float | None = Field(description="Bytes, without what is sent once.")
    per_device_and_round_with_preparation: float | None


class CurvePoint(Record):
    """After a round: validation scores, the mean of devices and runs, and bytes that had crossed by then."""

    round: int
    scores: Mapping[Metric, float]
    bytes_per_device: float


class Summary(Record):
    """One strategy over all its runs."""

    entry: Entry
    runs: int
    devices: Mapping[Metric, Interval] = Field(description="Mean of the devices, each on its own test rows.")
    by_device: Mapping[str, Mapping[Metric, float]]
    cloud: Mapping[str, Mapping[str, Mapping[Metric, float]]] = Field(description="llm, proxy -> set -> metric.")
    transfer: Mapping[Metric, tuple[tuple[float | None, ...], ...]] = Field(description="[device][set]")
    curve: tuple[CurvePoint, ...]
    cost: MeanCost
    notes: tuple[str, ...]


class QualityReport(Record):
    """The whole report."""

    format: Literal["cotune-quality/1"] = FORMAT
    title: str
    command: str
    configuration: Mapping[str, Any]
    facts: Mapping[str, Any] = Field(description="Machine, versions, time.")
    devices: tuple[DeviceFacts, ...]
    sets: tuple[str, ...] = Field(description="The columns of transfer matrices.")
    runs: tuple[str, ...]
    draws: int
    gates: tuple[Gate, ...]
    targets: tuple[Target, ...]
    baselines_not_run: tuple[str, ...]
    strategies: tuple[Summary, ...]
    comparisons: tuple[Comparison, ...] = Field(description="The method against each other strategy.")
    over_best: tuple[Comparison, ...] = Field(description="The method against the best baseline of each metric.")
    cloud_comparisons: tuple[Comparison, ...] = Field(description="The LLM on sets that only devices hold.")

    @property
    def failed_gates(self) -> tuple[Gate, ...]:
        """Gates that do not hold."""
        return tuple(each for each in self.gates if not each.passed)

    def summary(self, strategy: str) -> Summary:
        """One strategy's summary; KeyError if it is not in the report."""
        found = {each.entry.name: each for each in self.strategies}
        return found[strategy]


def build_report(
    *,
    title: str,
    command: str,
    configuration: Mapping[str, Any],
    facts: Mapping[str, Any],
    devices: Sequence[DeviceFacts],
    entries: Sequence[Entry],
    runs: Sequence[RunResult],
    gates: Sequence[Gate],
    wanted: Wanted,
    draws: int = DRAWS,
    seed: int = 0,
) -> QualityReport:
    """Put the report together.

    Args:
        title: of the report.
        command: that makes it again.
        configuration: everything that it depends on.
        facts: the machine and the versions.
        devices: of the experiment.
        entries: the strategies, in the order of the tables.
        runs: every run of each of them, with the same seeds and checkpoints.
        gates: as they were checked before any device trained.
        wanted: which strategies the targets are about.
        draws: of each interval.
        seed: of the draws.

    Raises:
        MeasurementError: a strategy without runs, runs of an unknown strategy, or runs that cannot be paired.
    """
    names = [each.name for each in entries]
    if unknown := sorted({each.key.strategy for each in runs} - set(names)):
        raise MeasurementError(f"expected runs of {', '.join(names)}; got some of {', '.join(unknown)}")
    sets = sorted({name for run in runs for model in run.own for name in run.scores[model]})
    how: dict[str, Any] = {"draws": draws, "seed": seed}
    comparisons, over_best = _device_comparisons(runs, names, wanted, how)
    cloud = _cloud_comparisons(runs, names, wanted, how)
    summaries = [_summary(entry, runs_of(runs, entry.name), devices, sets, how) for entry in entries]
    return QualityReport(
        title=title,
        command=command,
        configuration=configuration,
        facts=facts,
        devices=tuple(devices),
        sets=tuple(sets),
        runs=tuple(sorted({f"seed {each.key.seed}, checkpoint {each.key.checkpoint}" for each in runs})),
        draws=draws,
        gates=tuple(gates),
        targets=tuple(
            targets(
                wanted,
                comparisons=comparisons,
                over_best=over_best,
                cloud=cloud,
                bytes_each={each.entry.name: each.cost.per_device_and_round for each in summaries},
            )
        ),
        baselines_not_run=tuple(name for name in wanted.baselines if name not in names),
        strategies=tuple(summaries),
        comparisons=tuple(comparisons),
        over_best=tuple(over_best),
        cloud_comparisons=tuple(cloud),
    )


def write_json(report: QualityReport, path: Path) -> None:
    """Write the report, whole or not at all. Raises OSError if the folder cannot be written."""
    write_atomically(path, (report.model_dump_json(indent=1) + "\n").encode())


def read_json(path: Path) -> QualityReport:
    """Read a report that `write_json` wrote.

    Raises:
        OSError: no such file.
        ValueError: it is not a report of this format; names the fields.
    """
    return QualityReport.model_validate_json(path.read_bytes())


def _device_comparisons(
    runs: Sequence[RunResult], names: Sequence[str], wanted: Wanted, how: Mapping[str, Any]
) -> tuple[list[Comparison], list[Comparison]]:
    """The method against each other strategy on the devices' own rows; those against the best baseline."""
    method = wanted.method
    if method not in names:
        return [], []
    observed = {name: device_observations(runs, name) for name in names}
    found = {
        (name, metric): compare(observed[method], observed[name], metric, names=(method, name), **how)
        for name in names
        if name != method
        for metric in METRICS
    }
    baselines = {name: observed[name] for name in wanted.baselines if name in observed and name != method}
    over_best = [found[best_of(baselines, metric), metric] for metric in METRICS] if baselines else []
    return list(found.values()), over_best


def _cloud_comparisons(
    runs: Sequence[RunResult], names: Sequence[str], wanted: Wanted, how: Mapping[str, Any]
) -> list[Comparison]:
    """The LLM after the method against the LLM after public rows alone, on sets that only devices hold."""
    pair = (wanted.method, wanted.public_only)
    if not wanted.hidden_sets or not set(pair) <= set(names):
        return []
    ours, theirs = (model_observations(runs, name, LLM, wanted.hidden_sets) for name in pair)
    return [compare(ours, theirs, metric, names=pair, **how) for metric in METRICS]


def _summary(
    entry: Entry,
    runs: Sequence[RunResult],
    devices: Sequence[DeviceFacts],
    sets: Sequence[str],
    how: Mapping[str, Any],
) -> Summary:
    observed = device_observations(runs, entry.name)
    names = [each.name for each in devices]
    transfer: dict[Metric, tuple[tuple[float | None, ...], ...]] = {}
    for metric in METRICS:
        matrices = [transfer_matrix(run.scores, names, sets, metric) for run in runs]
        # A place that some run did not measure has no mean: NaN, which JSON lacks.
        mean = np.mean(matrices, axis=0).tolist()
        transfer[metric] = tuple(tuple(None if math.isnan(value) else value for value in row) for row in mean)
    by_device: dict[str, Mapping[Metric, float]] = {
        name: {metric: _mean([run.scores[name][run.own[name]].mean(metric) for run in runs]) for metric in METRICS}
        for name in names
    }
    cloud = {
        model: {
            rows: {metric: _mean([run.scores[model][rows].mean(metric) for run in runs]) for metric in METRICS}
            for rows in sorted(set.intersection(*(set(run.scores.get(model, {})) for run in runs)))
        }
        for model in (LLM, PROXY)
    }
    return Summary(
        entry=entry,
        runs=len(runs),
        devices={metric: score_interval(observed, metric, **how) for metric in METRICS},
        by_device=by_device,
        cloud={model: found for model, found in cloud.items() if found},
        transfer=transfer,
        curve=_curve(runs),
        cost=_cost(runs),
        notes=tuple(dict.fromkeys(note for run in runs for note in run.notes)),
    )


def _curve(runs: Sequence[RunResult]) -> tuple[CurvePoint, ...]:
    """Rounds that every run has."""
    rounds = sorted(set.intersection(*({each.round for each in run.rounds} for run in runs)))
    points = []
    for number in rounds:
        values: dict[Metric, list[float]] = {}
        for run in runs:
            found = next(each for each in run.rounds if each.round == number)
            for device in run.own:
                for metric, value in found.scores.get(device, {}).items():
                    values.setdefault(metric, []).append(value)
        sent = _mean([_bytes_until(run, number) for run in runs])
        means = {metric: _mean(found) for metric, found in values.items()}
        points.append(CurvePoint(round=number, scores=means, bytes_per_device=sent))
    return tuple(points)


def _bytes_until(run: RunResult, number: int) -> float:
    return sum(each.num_bytes for each in run.cost.traffic if each.round <= number) / max(1, len(run.own))


def _cost(runs: Sequence[RunResult]) -> MeanCost:
    costs = [run.cost for run in runs]
    each_round = {
        with_preparation: [each.bytes_per_device_and_round(with_preparation=with_preparation) for each in costs]
        for with_preparation in (False, True)
    }
    peaks: dict[str, int] = {}
    for cost in costs:
        for stage, peak in cost.peak_memory_bytes.items():
            peaks[stage] = max(peaks.get(stage, 0), peak)
    return MeanCost(
        steps=_mean_by_name([each.steps for each in costs]),
        wall_seconds=_mean_by_name([each.wall_seconds for each in costs]),
        cpu_seconds=_mean_by_name([each.cpu_seconds for each in costs]),
        peak_memory_bytes=peaks,
        peak_by_stage=all(each.peak_by_stage for each in costs),
        up=_mean_by_name([each.num_bytes("up") for each in costs]),
        down=_mean_by_name([each.num_bytes("down") for each in costs]),
        per_device_and_round=_mean_of_known(each_round[False]),
        per_device_and_round_with_preparation=_mean_of_known(each_round[True]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return _mean(known) if known else None


def _mean_by_name(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = list(dict.fromkeys(name for each in found for name in each))
    return {name: _mean([each.get(name, 0.0) for each in found]) for name in names}
