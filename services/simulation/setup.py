"""From settings and a data folder to an experiment that can be played, or to everything that is wrong with it.

Nothing trains, and no weights are read, before all of this holds.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from assets.data import examples_to_jsonl, read_examples
from assets.data_folders import PUBLIC_FILE, protected_rows
from assets.errors import DataFileError
from cotuning.examples import Example
from cotuning.public_rows import PublicRows, TooFewRows, split_public_rows
from protocol.strategies import PublicSet, SmallModel, StrategySpec, spec_of
from simulation.base_models import model_digest, model_problems
from simulation.errors import SetupError
from simulation.gates import without_protected
from simulation.participation import plan_rounds
from simulation.partition import DeviceRows, dirichlet_mixtures, one_domain_each, read_domains
from simulation.settings import Entry, SimulationSettings

T = TypeVar("T")

_NO_PART_OF_RESULTS = {"name", "strategies", "first_seed", "gates", "llm", "slms"}
"""Settings that a result does not depend on, or that its configuration has in another form."""


@dataclass(frozen=True)
class Device:
    """A device of the experiment.

    Attributes:
        rows: what it holds and is measured on.
        slm: folder or hub name of its model.
        rank: `max_adapter_rank` that it declares.
    """

    rows: DeviceRows
    slm: str
    rank: int | None

    @property
    def name(self) -> str:
        """Unique in the experiment."""
        return self.rows.name


@dataclass(frozen=True)
class Experiment:
    """Settings that fit their data.

    Attributes:
        settings: as read.
        folder: of the data.
        public: rows of `public.jsonl`, without those that are left out; none where there is no such file.
        left_out: public rows that hold a protected one, where the settings leave them out.
        devices: seed -> the devices of its runs.
        digests: of base models and public rows, by what it is.
    """

    settings: SimulationSettings
    folder: Path
    public: tuple[Example, ...]
    left_out: int
    devices: Mapping[int, Sequence[Device]]
    digests: Mapping[str, str]

    def public_rows(self, spec: StrategySpec, seed: int) -> PublicRows | None:
        """The public rows dealt as in a deployment; None where there are none.

        Raises:
            TooFewRows: nothing would be left to train on.
        """
        return _public_rows(self.settings, spec, self.public, self.folder, seed)

    def configuration(self, entry: Entry | None, seed: int) -> dict[str, Any]:
        """Everything that the results of a strategy with a seed depend on; None: those of the base models.

        Other strategies of the experiment are no part of it, nor how they are called in reports.
        """
        own = None if entry is None else entry.model_dump(mode="json", include={"settings", "proxy"})
        common = self.settings.model_dump(
            mode="json", exclude={"name", "strategies", "first_seed", "llm", "slms", "gates"}
        )
        digests = {**self.digests, "devices": _rows_digest(self.devices[seed])}
        return {"common": common, "strategy": own, "digests": digests}


def set_up(settings: SimulationSettings, folder: Path, seeds: Sequence[int]) -> Experiment:
    """Check that the experiment can be played with every seed.

    Raises:
        SetupError: it cannot; names everything that was found.
    """
    problems: list[str] = []
    proxies = [settings.proxy, *(entry.proxy for entry in settings.strategies if entry.proxy is not None)]
    paths = sorted({each.path for each in proxies if each.path is not None})
    models = [*([settings.llm] if settings.llm is not None else []), *paths, *settings.slms]
    problems += model_problems(models, longest_row=settings.longest_row)
    public_file = folder / PUBLIC_FILE
    public, left_out = _noted(problems, lambda: _public(settings, folder)) or ((), 0)
    devices = _noted(problems, lambda: [_devices(settings, folder, seed) for seed in seeds])
    problems += [each for entry in settings.strategies for each in _strategy_problems(settings, entry, public_file)]
    for spec in {spec_of(entry.settings).public_set: spec_of(entry.settings) for entry in settings.strategies}.values():
        if public:
            _noted(problems, partial(_public_rows, settings, spec, public, folder, seeds[0]))
    if devices:
        problems += _device_problems(settings, devices[0])
    if problems:
        listed = "\n".join(f"- {each}" for each in dict.fromkeys(problems))
        raise SetupError(f"{len(dict.fromkeys(problems))} thing(s) to correct before anything can be played:\n{listed}")
    digests = {"llm": model_digest(settings.llm)} if settings.llm is not None else {}
    digests |= {f"proxy {each}": model_digest(each) for each in paths}
    digests |= {f"slm {place}": model_digest(each) for place, each in enumerate(settings.slms, start=1)}
    digests["public"] = hashlib.sha256(examples_to_jsonl(public)).hexdigest()
    assert devices is not None
    return Experiment(settings, folder, public, left_out, dict(zip(seeds, devices, strict=True)), digests)


def _devices(settings: SimulationSettings, folder: Path, seed: int) -> list[Device]:
    dealt, rows = settings.devices, settings.evaluation
    if dealt.alpha is not None:
        assert dealt.count is not None
        assert dealt.size is not None
        held = dirichlet_mixtures(
            read_domains(folder, dealt.domains),
            dealt.count,
            alpha=dealt.alpha,
            size=dealt.size,
            validation_size=rows.validation_rows,
            test_size=max(1, rows.test_rows),
            seed=seed,
        )
    else:
        domains = read_domains(
            folder, dealt.domains, validation_rows=rows.validation_rows, test_rows=max(1, rows.test_rows)
        )
        placed = [name for name in domains for _ in range(dealt.per_domain)]
        held = one_domain_each(domains, placed, sizes=dealt.sizes, seed=seed)
    ranks = dealt.ranks or [None] * len(held)
    if len(ranks) != len(held):
        raise SetupError(f"expected `devices.ranks` to name a rank for each of {len(held)} devices, got {len(ranks)}")
    return [
        Device(each, settings.slms[place % len(settings.slms)], rank)
        for place, (each, rank) in enumerate(zip(held, ranks, strict=True))
    ]


def _public(settings: SimulationSettings, folder: Path) -> tuple[tuple[Example, ...], int]:
    """The public rows, and how many are left out."""
    file = folder / PUBLIC_FILE
    rows = read_examples(file) if file.is_file() else []
    if not settings.drop_contaminated:
        return tuple(rows), 0
    kept, found = without_protected(protected_rows(folder), rows)
    return tuple(kept), len(found)


def _public_rows(
    settings: SimulationSettings, spec: StrategySpec, public: Sequence[Example], folder: Path, seed: int
) -> PublicRows | None:
    if not public or (spec.small_model is SmallModel.NONE and not spec.trains_llm):
        return None  # there is no model of the server's to measure, or to train, on them
    return split_public_rows(
        public,
        probe_rows=settings.probe_rows if spec.public_set is PublicSet.SERVER_AND_DEVICES else 0,
        validation_rows=settings.evaluation.validation_rows,
        seed=seed,
        source=str(folder / PUBLIC_FILE),
    )


def _strategy_problems(settings: SimulationSettings, entry: Entry, public_file: Path) -> list[str]:
    spec, problems = spec_of(entry.settings), []
    if spec.needs_llm and settings.llm is None:
        problems.append(f"strategy {entry.label} ({spec.name}): expected `llm` to name a model, got none")
    if spec.public_set is not PublicSet.NOWHERE and not public_file.is_file():
        problems.append(f"strategy {entry.label} ({spec.name}): expected public rows at {public_file}, found no file")
    if spec.small_model is SmallModel.DEVICES_OWN and len(set(settings.slms)) > 1:
        problems.append(
            f"strategy {entry.label} ({spec.name}) averages adapters of one small model with one tokenizer: expected "
            f"one in `slms`, got {', '.join(dict.fromkeys(settings.slms))}"
        )
    return problems


def _device_problems(settings: SimulationSettings, devices: Sequence[Device]) -> list[str]:
    problems: list[str] = []
    if len(settings.slms) > len(devices):
        problems.append(f"expected at most as many `slms` as devices, got {len(settings.slms)} for {len(devices)}")
    dealt = settings.devices
    _noted(
        problems,
        lambda: plan_rounds(
            len(devices), settings.rounds, share=dealt.share, drop_out=dealt.drop_out, fewest=dealt.fewest, seed=0
        ),
    )
    return problems


def _noted(problems: list[str], make: Callable[[], T]) -> T | None:
    try:
        return make()
    except (SetupError, DataFileError, TooFewRows) as error:
        problems.append(str(error))
        return None


def _rows_digest(devices: Sequence[Device]) -> str:
    digest = hashlib.sha256()
    for device in devices:
        digest.update(f"{device.name}\0{device.rows.test_set}\0".encode())
        for rows in (device.rows.train, device.rows.validation, device.rows.test):
            digest.update(hashlib.sha256(examples_to_jsonl(rows)).digest())
    return digest.hexdigest()
