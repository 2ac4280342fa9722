"""Every model of a run on the rows of the experiment, with the adapters that it has learnt."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from cotuning.adapters import AdapterState, adapted
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.strategies.preparation import peft_config
from cotuning.strategies.promotion import candidates
from protocol.strategies import LoraSettings
from simulation.base_models import BaseModels
from simulation.rounds import Run
from simulation.run_results import RoundScores
from simulation.scores import METRICS, Metric, RowScores, score
from simulation.settings import BEFORE, SimulationSettings
from simulation.setup import Device

OnMeasured = Callable[[str, int, int], None]
"""Told a model's name and how many of how many rows it has done."""

ModelScores = dict[str, dict[str, RowScores]]
"""Model -> set of rows -> scores."""


def measure_run(run: Run, settings: SimulationSettings, on_measured: OnMeasured, *, transfer: bool) -> ModelScores:
    """Test scores after the run's newest promoted version.

    Args:
        run: played.
        settings: of the experiment.
        transfer: measure each device's model on every device's rows, not on its own alone.
        on_measured: told how far it is.
    """
    sets = test_sets(run.devices)
    scores: ModelScores = {}
    for device in run.devices:
        adapter = run.local[device.name].slm_adapter
        wanted = sets if transfer else {device.rows.test_set: device.rows.test}
        with with_adapter(run.models.slm(device.slm), run.settings.slm_lora, adapter) as lm:
            scores[device.name] = measure(lm, device.name, wanted, settings, on_measured)
    with candidates(
        run.settings,
        llm=run.prepared.llm if run.spec.trains_llm else None,
        shared_model=run.prepared.shared_model,
        shared_adapter=run.base.shared_adapter,
        llm_adapter=run.base.llm_adapter,
    ) as models:
        for name, lm in models.items():
            scores[name] = measure(lm, name, sets, settings, on_measured)
    return scores


def measure_base(
    devices: Sequence[Device],
    models: BaseModels,
    cloud: Mapping[str, LanguageModel],
    settings: SimulationSettings,
    on_measured: OnMeasured,
) -> ModelScores:
    """Test scores before any device trains.

    Args:
        devices: with their rows and models.
        models: the base models.
        cloud: the LLM and the proxy as round 1 finds them, as far as there are any.
        settings: of the experiment.
        on_measured: told how far it is.
    """
    sets = test_sets(devices)
    scores: ModelScores = {}
    found: ModelScores = {}
    for device in devices:
        known = found.setdefault(device.slm, {})  # devices with the same model have the same scores
        wanted = sets if settings.measures_transfer(BEFORE) else {device.rows.test_set: device.rows.test}
        missing = {name: rows for name, rows in wanted.items() if name not in known}
        known |= measure(models.slm(device.slm), device.name, missing, settings, on_measured)
        scores[device.name] = {name: known[name] for name in wanted}
    return scores | {name: measure(lm, name, sets, settings, on_measured) for name, lm in cloud.items()}


def measure_round(run: Run, number: int, settings: SimulationSettings, on_measured: OnMeasured) -> RoundScores:
    """Validation scores of each device on its own rows, as they are after a round."""
    found: dict[str, Mapping[Metric, float]] = {}
    for device in run.devices:
        adapter, rows = run.local[device.name].slm_adapter, {"validation": device.rows.validation}
        with with_adapter(run.models.slm(device.slm), run.settings.slm_lora, adapter) as lm:
            scores = measure(lm, device.name, rows, settings, on_measured)["validation"]
        found[device.name] = {metric: scores.mean(metric) for metric in METRICS}
    return RoundScores(round=number, scores=found)


def test_sets(devices: Sequence[Device]) -> dict[str, Sequence[Example]]:
    """Every set of test rows by name."""
    return {device.rows.test_set: device.rows.test for device in devices}


def measure(
    lm: LanguageModel,
    model: str,
    sets: Mapping[str, Sequence[Example]],
    settings: SimulationSettings,
    on_measured: OnMeasured,
) -> dict[str, RowScores]:
    """One model, as it stands, on several sets of rows."""
    return {
        name: score(
            lm,
            rows,
            name=name,
            max_new_tokens=settings.evaluation.max_new_tokens,
            max_length=settings.measured_length,
            on_rows=lambda done, total, name=name: on_measured(f"{model} on {name}", done, total),  # type: ignore[misc]
        )
        for name, rows in sets.items()
    }


def with_adapter(
    lm: LanguageModel, lora: LoraSettings, state: AdapterState | None
) -> AbstractContextManager[LanguageModel]:
    """Lend a device's model with what it has learnt; as it is where it has learnt nothing yet."""
    return nullcontext(lm) if state is None else adapted(lm, peft_config(lm, lora), {"slm": state})
