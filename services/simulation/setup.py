"""From settings and a data folder to an experiment that can be played, or to everything that is wrong with it.

Nothing trains, and no weights are read, before all of this holds.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from assets.data import examples_to_jsonl, read_examples
from assets.data_folders import PUBLIC_FILE, SPLITS, domains_of, protected_rows
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


CONTAMINATED = "hold a private, validation or test row"
DEVICES_ALONE = "of domains that only devices hold"
"""Why public rows are left out."""


@dataclass(frozen=True)
class Experiment:
    """Settings that fit their data.

    Attributes:
        settings: as read.
        folder: of the data.
        public: rows of `public.jsonl`, without those that are left out; none where there is no such file.
        left_out: why public rows are left out -> how many.
        devices: seed -> the devices of its runs.
        digests: of base models and public rows, by what it is.
    """

    settings: SimulationSettings
    folder: Path
    public: tuple[Example, ...]
    left_out: Mapping[str, int]
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
        kind = "before" if entry is None else entry.kind
        common = self.settings.model_dump(mode="json", exclude=_NO_PART_OF_RESULTS)
        common["transfer"] = self.settings.measures_transfer(kind)
        digests = {**self.digests, "devices": _rows_digest(self.devices[seed])}
        if entry is None:
            common["proxy"] = common["proxy"] if self.settings.with_the_proxy is not None else None
        return {"common": common, "strategy": own, "digests": digests}


def set_up(settings: SimulationSettings, folder: Path, seeds: Sequence[int]) -> Experiment:
    """Check that the experiment can be played with every seed.

    Raises:
        SetupError: it cannot; names everything that was found.
    """
    paths = proxy_paths(settings)
    models = [*([settings.llm] if settings.llm is not None else []), *paths, *settings.slms]
    problems = model_problems(models, longest_row=settings.longest_row)
    found = _look_at_data(settings, folder, seeds, problems)
    _raise(problems)
    assert found is not None
    public, left_out, devices = found
    digests = {"llm": model_digest(settings.llm)} if settings.llm is not None else {}
    digests |= {f"proxy {each}": model_digest(each) for each in paths}
    digests |= {f"slm {place}": model_digest(each) for place, each in enumerate(settings.slms, start=1)}
    digests["public"] = hashlib.sha256(examples_to_jsonl(public)).hexdigest()
    return Experiment(settings, folder, public, left_out, dict(zip(seeds, devices, strict=True)), digests)


def check_data(settings: SimulationSettings, folder: Path, seeds: Sequence[int]) -> None:
    """Check all of it but the models, which need not be there yet. Raises SetupError as `set_up`."""
    problems: list[str] = []
    _look_at_data(settings, folder, seeds, problems)
    _raise(problems)


def proxy_paths(settings: SimulationSettings) -> list[str]:
    """Models that proxies are made of."""
    proxies = [settings.proxy, *(entry.proxy for entry in settings.strategies if entry.proxy is not None)]
    return sorted({each.path for each in proxies if each.path is not None})


_Found = tuple[tuple[Example, ...], dict[str, int], list[list[Device]]]
"""Public rows, why others are left out, and the devices of each seed."""


def _look_at_data(
    settings: SimulationSettings, folder: Path, seeds: Sequence[int], problems: list[str]
) -> _Found | None:
    """Read and deal the rows; adds what is wrong to `problems`. None where there are no devices."""
    public_file = folder / PUBLIC_FILE
    read = _noted(problems, lambda: _public(settings, folder))
    public, left_out = read or ((), {})
    devices = _noted(problems, lambda: [_devices(settings, folder, seed) for seed in seeds])
    problems += [each for entry in settings.strategies for each in _strategy_problems(settings, entry, public_file)]
    if read is not None and public_file.is_file() and not public and _need_public_rows(settings):
        problems.append(f"{public_file}: expected public rows, got none that is not left out")
    for spec in {spec_of(entry.settings).public_set: spec_of(entry.settings) for entry in settings.strategies}.values():
        if public:
            _noted(problems, partial(_public_rows, settings, spec, public, folder, seeds[0]))
    if not devices:
        return None
    problems += _device_problems(settings, devices[0])
    return public, left_out, devices


def _need_public_rows(settings: SimulationSettings) -> bool:
    return any(spec_of(each.settings).public_set is not PublicSet.NOWHERE for each in settings.strategies)


def _raise(problems: Sequence[str]) -> None:
    if problems:
        listed = "\n".join(f"- {each}" for each in dict.fromkeys(problems))
        raise SetupError(f"{len(dict.fromkeys(problems))} thing(s) to correct before anything can be played:\n{listed}")


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


def _public(settings: SimulationSettings, folder: Path) -> tuple[tuple[Example, ...], dict[str, int]]:
    """The public rows, and why others are left out, with how many."""
    file = folder / PUBLIC_FILE
    rows = read_examples(file) if file.is_file() else []
    left_out = {}
    if hidden := settings.public.leave_out_domains:
        kept = without_tasks(rows, tasks_of(folder, _held(settings, folder), hidden), file)
        left_out[DEVICES_ALONE] = len(rows) - len(kept)
        rows = kept
    if settings.drop_contaminated:
        rows, found = without_protected(protected_rows(folder), rows)
        left_out[CONTAMINATED] = len(found)
    return tuple(rows), left_out


def _held(settings: SimulationSettings, folder: Path) -> Sequence[str]:
    """Domains whose rows devices hold."""
    return settings.devices.domains or domains_of(folder)


def tasks_of(folder: Path, held: Sequence[str], domains: Sequence[str]) -> set[str]:
    """The tasks of all rows of `domains`.

    Args:
        folder: of the data.
        held: domains of the devices.
        domains: some of them.

    Raises:
        SetupError: one is not among `held`, or a row of it names no task.
        DataFileError: a split is missing, or a row cannot be read.
    """
    if unknown := [name for name in domains if name not in held]:
        raise SetupError(
            f"expected `public.leave_out_domains` among the devices' domains, {', '.join(held)}; got "
            f"{', '.join(unknown)}"
        )
    found = {
        row.task for name in domains for split in SPLITS for row in read_examples(folder / name / f"{split}.jsonl")
    }
    if "" in found:
        raise SetupError(f"expected a `task` in every row of {', '.join(domains)}, by which public rows are left out")
    return found


def without_tasks(rows: Sequence[Example], tasks: Set[str], file: Path) -> list[Example]:
    """Rows of other tasks. Raises SetupError where one names no task: it could be of any."""
    if nameless := [row.id for row in rows if not row.task]:
        raise SetupError(f"{file}: expected a `task` in every row, to leave some out; got none in {nameless[0]}")
    return [row for row in rows if row.task not in tasks]


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
