"""The gates of an experiment, measured before any device trains: on its devices' validation rows, with its first seed.

The LLM is tuned on public rows alone, for as many steps as the method's server takes in all rounds. The proxy is the
method's, as round 1 finds it. Figures are kept, like results.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from assets.atomic import write_atomically
from cotuning.language_model import LanguageModel
from cotuning.strategies.interface import ServerInputs
from cotuning.strategies.tuning import adapter_training, public_steps, with_adapter
from cotuning.training import TrainingDiverged
from cotuning.tuning import train_adapter
from protocol.strategies import SmallModel, spec_of
from simulation.base_models import BaseModels
from simulation.budget import Crossing, Meter
from simulation.cache import configuration_hash
from simulation.errors import CacheError, RoundFailed
from simulation.gates import Gate, exact_match_gate, lead_gate, proxy_gate
from simulation.measuring import measure
from simulation.player import Listener
from simulation.prepared import Prepared, prepare
from simulation.scores import RowScores
from simulation.settings import Entry, SimulationSettings
from simulation.setup import Device, Experiment

STAGE = "gates_public_tuning"
_GATES = TypeAdapter(list[Gate])


def check_gates(
    experiment: Experiment, cache_folder: Path, models: BaseModels, listener: Listener | None = None
) -> list[Gate]:
    """Measure the gates, or read what was measured before; none where no strategy trains an LLM on public rows.

    Args:
        experiment: from `setup.set_up`.
        cache_folder: as for `run_experiment`.
        models: the base models.
        listener: told how far it is.

    Raises:
        SetupError: a model cannot be loaded, or the proxy's settings do not fit the LLM.
        RoundFailed: the tuning of the LLM, or the proxy's distillation, came to no number.
        CacheError: the kept file cannot be used.
    """
    entry = judged_entry(experiment.settings)
    if entry is None:
        return []
    seed = next(iter(experiment.devices))
    path = cache_folder / f"gates-{configuration_hash(experiment.configuration(entry, seed))[:16]}.json"
    if path.is_file():
        try:
            return _GATES.validate_json(path.read_bytes())
        except ValidationError as error:
            raise CacheError(f"{path}: expected gates, got {error.error_count()} faults; remove the file") from None
    torch.set_num_threads(experiment.settings.threads)
    try:
        gates = _measured(experiment, entry, seed, cache_folder / "proxies", models, listener or Listener())
    except TrainingDiverged as error:
        raise RoundFailed(f"gates: {error}") from error
    write_atomically(path, _GATES.dump_json(gates))
    return gates


def judged_entry(settings: SimulationSettings) -> Entry | None:
    """Whose LLM and proxy the gates are about: the first method's, else those of the first that tunes an LLM."""
    able = [each for each in settings.strategies if spec_of(each.settings).trains_llm and each.settings.server_steps]
    return next((each for each in able if each.kind == "method"), able[0] if able else None)


def _measured(  # noqa: PLR0917
    experiment: Experiment, entry: Entry, seed: int, proxies: Path, models: BaseModels, listener: Listener
) -> list[Gate]:
    prepared = prepare(
        experiment,
        entry,
        models,
        seed,
        folder=proxies,
        meter=Meter(Crossing()),
        on_progress=lambda stage, step, steps, _: listener.on_progress(f"proxy: {stage}", step, steps),
    )
    devices = experiment.devices[seed]

    def scores(lm: LanguageModel, name: str, device: Device) -> RowScores:
        rows = {device.name: device.rows.validation}
        return measure(lm, name, rows, experiment.settings, listener.on_progress)[device.name]

    slms = {device.name: scores(models.slm(device.slm), "SLM", device) for device in devices}
    with _tuned_llm(prepared, entry, seed, experiment.settings.rounds, listener) as tuned:
        llm = {device.name: scores(tuned, "tuned LLM", device) for device in devices}
    gates = [exact_match_gate(llm), lead_gate(llm, slms)]
    if spec_of(entry.settings).small_model is SmallModel.DISTILLED_PROXY and prepared.shared_model is not None:
        proxy = {device.name: scores(prepared.shared_model, "proxy", device) for device in devices}
        gates.append(proxy_gate(llm, proxy, slms))
    return gates


@contextmanager
def _tuned_llm(prepared: Prepared, entry: Entry, seed: int, rounds: int, listener: Listener) -> Iterator[LanguageModel]:
    server, lora = entry.settings.server_steps, entry.settings.trained_llm_lora
    assert prepared.llm is not None
    assert prepared.rows is not None
    assert server is not None
    assert lora is not None

    def tell(_: str, step: int, steps: int, losses: Mapping[str, float]) -> None:
        del losses
        listener.on_progress("LLM on public rows", step, steps)

    with with_adapter(prepared.llm, "llm", None, lora, seed=seed) as lent:
        for number in range(1, rounds + 1):
            given = ServerInputs(round_number=number, seed=seed, on_progress=tell, public=prepared.rows.training)
            options = adapter_training(server, given, stage=STAGE)
            step_at = public_steps(lent, given, server)
            train_adapter(lent, "llm", step_at, steps=server.steps, **options)
        lent.model.eval()
        yield lent
