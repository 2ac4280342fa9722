"""What one strategy reached with one seed and one set of base models: what a simulator returns and a cache keeps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

from pydantic import Field, model_validator

from simulation.budget import Cost
from simulation.errors import MeasurementError
from simulation.scores import Metric, Record, RowScores

LLM, PROXY = "llm", "proxy"
"""Names of the cloud's models among the devices'."""


class RunKey(Record):
    """Which run: results with equal keys are of the same training."""

    strategy: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    seed: int = Field(ge=0)
    checkpoint: str = Field(default="0", pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$", description="Which base models.")

    def __str__(self) -> str:
        return f"{self.strategy}, seed {self.seed}, checkpoint {self.checkpoint}"


class RoundScores(Record):
    """Validation scores after a round; round 0 is before the first."""

    round: int = Field(ge=0)
    scores: Mapping[str, Mapping[Metric, float]] = Field(description="Model -> metric -> value.")


class RunResult(Record):
    """One run. `before` training is a run of its own, of a strategy that trains nothing."""

    key: RunKey
    own: Mapping[str, str] = Field(description="Device -> the set of rows, in `scores`, of its own data.")
    scores: Mapping[str, Mapping[str, RowScores]] = Field(
        description="Test: a device's name, `llm` or `proxy` -> name of the set of rows -> scores."
    )
    rounds: tuple[RoundScores, ...] = ()
    cost: Cost = Cost()
    notes: tuple[str, ...] = Field(default=(), description="What a reader must know, as sentences.")

    @model_validator(mode="after")
    def _devices_are_measured_on_their_own_rows(self) -> Self:
        for device, rows in self.own.items():
            if rows not in self.scores.get(device, {}):
                raise ValueError(f"expected scores of {device} on its own rows {rows!r}, got none")
        wrong = [rows for sets in self.scores.values() for rows, found in sets.items() if found.rows != rows]
        if wrong:
            raise ValueError(f"expected each set of rows under its own name, got others for {', '.join(wrong)}")
        return self


class Cell(Record):
    """Where a measurement stands: which base models, which seed, and what is averaged over (a device, a domain)."""

    checkpoint: str
    seed: int
    unit: str


Observations = Mapping[Cell, RowScores]
"""Everything measured of one strategy that one number is to be made of."""


def runs_of(runs: Iterable[RunResult], strategy: str) -> list[RunResult]:
    """The runs of a strategy.

    Raises:
        MeasurementError: there is none, or one twice.
    """
    found = [each for each in runs if each.key.strategy == strategy]
    if not found:
        raise MeasurementError(f"expected runs of the strategy {strategy!r}, got none")
    if len({each.key for each in found}) < len(found):
        raise MeasurementError(f"expected each run once, got one twice: {', '.join(sorted(str(e.key) for e in found))}")
    return found


def device_observations(runs: Iterable[RunResult], strategy: str) -> Observations:
    """Each device's model on its own rows.

    Raises:
        MeasurementError: no run of the strategy.
    """
    return {
        Cell(checkpoint=run.key.checkpoint, seed=run.key.seed, unit=device): run.scores[device][rows]
        for run in runs_of(runs, strategy)
        for device, rows in run.own.items()
    }


def model_observations(runs: Iterable[RunResult], strategy: str, model: str, sets: Sequence[str]) -> Observations:
    """One model on several sets of rows.

    Args:
        runs: of any strategies.
        strategy: whose.
        model: `LLM`, `PROXY` or a device's name.
        sets: names of the sets.

    Raises:
        MeasurementError: no run of the strategy, no sets, or a run that did not measure one.
    """
    found = {}
    for run in runs_of(runs, strategy):
        for rows in sets:
            measured = run.scores.get(model, {}).get(rows)
            if measured is None:
                raise MeasurementError(f"expected scores of {model} on {rows!r} in {run.key}, got none")
            found[Cell(checkpoint=run.key.checkpoint, seed=run.key.seed, unit=rows)] = measured
    if not found:
        raise MeasurementError(f"expected at least one set of rows for {model}, got none")
    return found
