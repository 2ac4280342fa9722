"""From the results of an experiment to its report."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from assets.data_folders import protected_rows
from cotuning.contamination import text_of
from simulation.base_models import described
from simulation.gates import Gate, contamination_gate
from simulation.report import DeviceFacts, Entry, QualityReport, build_report
from simulation.run_results import RunResult
from simulation.settings import BEFORE, SimulationSettings
from simulation.settings import Entry as Played
from simulation.setup import Experiment
from simulation.targets import Wanted

_FLOAT32_BYTES = 4
_VERSIONS = ("cotune", "torch", "transformers", "peft")


def public_gate(experiment: Experiment) -> Gate | None:
    """Whether the public rows hold a private, validation or test row; None where there are no public rows.

    Raises:
        DataFileError: a domain of the folder lacks a split, or a row cannot be read.
    """
    if not experiment.public:
        return None
    return contamination_gate(
        protected_rows(experiment.folder), {"public rows": [text_of(row) for row in experiment.public]}
    )


def report_of(
    experiment: Experiment, runs: Sequence[RunResult], *, command: str, gates: Sequence[Gate], seconds: float
) -> QualityReport:
    """The report of an experiment.

    Args:
        experiment: that was played.
        runs: every result of it.
        command: that makes it again.
        gates: as they were checked before anything trained.
        seconds: that it took this time, without what was kept from before.
    """
    settings = experiment.settings
    devices = _devices(experiment, next(iter(experiment.devices)))
    return build_report(
        title=settings.name,
        command=command,
        configuration={"settings": settings.model_dump(mode="json"), "digests": dict(experiment.digests)},
        facts=_facts(seconds) | {"public rows left out": dict(experiment.left_out)},
        devices=devices,
        entries=_entries(settings),
        runs=runs,
        gates=gates,
        wanted=_wanted(experiment, devices),
    )


def _entries(settings: SimulationSettings) -> list[Entry]:
    played = [Entry(name=each.label, kind=each.kind, about=each.about or _about(each)) for each in settings.strategies]
    return [Entry(name=BEFORE, kind="before", about="the base models, before any training"), *played]


def _about(entry: Played) -> str:
    name = entry.settings.name
    return f"{name}, the processor time of {entry.equal_cpu_to}" if entry.equal_cpu_to is not None else name


def _wanted(experiment: Experiment, devices: Sequence[DeviceFacts]) -> Wanted:
    """Targets are about the method of the experiment, if it has one, against its baselines and controls."""
    named: dict[str, list[str]] = {}
    for each in experiment.settings.strategies:
        named.setdefault(each.kind, []).append(each.label)
    usual = Wanted()
    return Wanted(
        method=next(iter(named.get("method", [])), usual.method),
        baselines=tuple(named.get("baseline", usual.baselines)),
        controls=tuple(named.get("control", usual.controls)),
        hidden_sets=_hidden_sets(experiment),
        full_model_bytes=_full_model_bytes(devices),
    )


def _hidden_sets(experiment: Experiment) -> tuple[str, ...]:
    """Test rows of devices that hold nothing but domains that the server's rows leave out."""
    hidden = set(experiment.settings.public.leave_out_domains)
    first = experiment.devices[next(iter(experiment.devices))]
    return tuple(dict.fromkeys(each.rows.test_set for each in first if set(each.rows.mixture) <= hidden))


def _full_model_bytes(devices: Sequence[DeviceFacts]) -> float | None:
    """What FedAvg of whole SLMs in float32 sends for a device in a round, both ways, the mean of the devices."""
    total = sum(each.parameters for each in devices)
    return 2 * _FLOAT32_BYTES * total / len(devices) if total else None


def _devices(experiment: Experiment, seed: int) -> list[DeviceFacts]:
    about = {device.slm: described(device.slm) for device in experiment.devices[seed]}
    return [
        DeviceFacts(
            name=device.name,
            mixture=device.rows.mixture,
            test_rows=len(device.rows.test),
            **about[device.slm],
        )
        for device in experiment.devices[seed]
    ]


def _facts(seconds: float) -> dict[str, Any]:
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in _VERSIONS},
        "seconds": round(seconds, 1),
    }
