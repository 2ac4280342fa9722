"""Which device holds which rows: drawn once from a seed, before anything trains, and equal for every strategy.

Names: D domains.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from assets.data import EXTRA_REFERENCES_FILE, read_examples
from assets.data_folders import SPLITS, domains_of
from cotuning.examples import Example
from cotuning.seeding import derive_seed
from simulation.errors import SetupError

FEWEST_DEVICES = 2


@dataclass(frozen=True)
class DomainRows:
    """The rows of one domain, with every accepted answer that `extra_references.jsonl` has for them."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True)
class DeviceRows:
    """What one device holds, and what its model is measured on.

    Attributes:
        name: unique in the experiment.
        mixture: domain -> rows of it in `train`, most first, none that has no row.
        test_set: names `test`: devices with equal test rows have equal names, others do not.
    """

    name: str
    mixture: Mapping[str, int]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    test_set: str

    @property
    def domain(self) -> str:
        """The domain that most of its rows are of."""
        return next(iter(self.mixture))


def read_domains(
    folder: Path,
    names: Sequence[str] | None = None,
    *,
    validation_rows: int | None = None,
    test_rows: int | None = None,
) -> dict[str, DomainRows]:
    """Read domains from a data folder (see `assets.data_folders`).

    Args:
        folder: the data folder.
        names: domains to read, all if None.
        validation_rows: at most so many a domain; the same ones for every seed of an experiment, so that seeds can be
            compared row by row.
        test_rows: as `validation_rows`.

    Raises:
        SetupError: an unknown domain, a domain without one of its splits, a split without rows, a limit below 1.
        DataFileError: no data folder, or a row that cannot be read; names file and line.
    """
    limits = {"train": None, "validation": validation_rows, "test": test_rows}
    if wrong := {split: limit for split, limit in limits.items() if limit is not None and limit < 1}:
        raise SetupError(f"expected limits of at least 1 row, got {wrong}")
    known = domains_of(folder)
    wanted = list(dict.fromkeys(names)) if names is not None else known
    if unknown := [name for name in wanted if name not in known]:
        raise SetupError(f"{folder}: expected domains among {', '.join(known)}; got {', '.join(unknown)}")
    files = {(name, split): folder / name / f"{split}.jsonl" for name in wanted for split in SPLITS}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise SetupError(f"expected {', '.join(SPLITS)}.jsonl of every domain; missing: {', '.join(missing)}")
    extra = folder / EXTRA_REFERENCES_FILE
    references = extra if extra.is_file() else None
    rows = {place: tuple(read_examples(path, extra_references=references)) for place, path in files.items()}
    if empty := [str(files[place]) for place, found in rows.items() if not found]:
        raise SetupError(f"expected at least one row in every split, got none in {', '.join(empty)}")
    return {
        name: DomainRows(name, *(_limited(rows[name, split], limits[split], name, split) for split in SPLITS))
        for name in wanted
    }


def one_domain_each(
    domains: Mapping[str, DomainRows], placed: Sequence[str], *, sizes: int | Sequence[int] | None = None, seed: int
) -> list[DeviceRows]:
    """A device a name in `placed`, with rows of that domain only.

    Devices of the same domain share its validation and test rows and no row of `train`.

    Args:
        domains: what there is.
        placed: each device's domain.
        sizes: training rows of each device, or of every one; None: a domain's rows are dealt evenly to its devices.
        seed: draws the rows.

    Raises:
        SetupError: fewer than two devices, an unknown domain, sizes of another number or more than the data has.
    """
    _require_devices(len(placed))
    if unknown := sorted(set(placed) - domains.keys()):
        raise SetupError(f"expected domains among {', '.join(domains)}; got {', '.join(unknown)}")
    held = Counter(placed)
    wanted = _sizes(sizes if sizes is not None else [len(domains[each].train) // held[each] for each in placed], placed)
    asked = {name: sum(size for size, each in zip(wanted, placed, strict=True) if each == name) for name in held}
    if short := [name for name, count in asked.items() if count > len(domains[name].train)]:
        told = ", ".join(f"{name} has {len(domains[name].train)}, asked for are {asked[name]}" for name in short)
        raise SetupError(f"expected sizes that the training rows suffice for: {told}")
    drawn = {name: _shuffled(domains[name].train, seed, name, "train") for name in held}
    taken: Counter[str] = Counter()
    devices = []
    for name, size in zip(placed, wanted, strict=True):
        rows = drawn[name][:size]
        del drawn[name][:size]
        taken[name] += 1
        known = f"{name}-{taken[name]}" if held[name] > 1 else name
        own = domains[name]
        devices.append(DeviceRows(known, {name: size}, tuple(rows), own.validation, own.test, name))
    return devices


def dirichlet_mixtures(
    domains: Mapping[str, DomainRows],
    num_devices: int,
    *,
    alpha: float,
    size: int,
    validation_size: int,
    test_size: int,
    seed: int,
) -> list[DeviceRows]:
    """Devices with mixtures of domains: device i's shares p_i ~ Dirichlet(alpha, ..., alpha), as in Hsu et al. (arXiv
    1909.06335), whose prior over classes is even here.

    The smaller `alpha`, the fewer domains a device has. Counts are the shares times the size, rounded so that they add
    up; rows are drawn without replacement, in all three splits with the same shares, so no two devices share a row.
    What a domain has no more rows for comes from the device's other domains in proportion to their shares.

    Args:
        domains: what there is; at least two.
        num_devices: at least two.
        alpha: above 0.
        size: training rows a device.
        validation_size: its validation rows.
        test_size: its test rows.
        seed: draws shares and rows.

    Raises:
        SetupError: one of these does not hold, or the sizes are more than the data has.
    """
    _require_devices(num_devices)
    if len(domains) < 2:
        raise SetupError(f"expected at least 2 domains to mix, got {', '.join(domains) or 'none'}")
    if not (isfinite(alpha) and alpha > 0):
        raise SetupError(f"expected a finite alpha above 0, got {alpha}")
    wanted = dict(zip(SPLITS, (size, validation_size, test_size), strict=True))
    for split, count in wanted.items():
        held = sum(len(getattr(each, split)) for each in domains.values())
        if count < 1 or count * num_devices > held:
            raise SetupError(
                f"expected between 1 and {held // num_devices} {split} rows a device, since the domains have {held} "
                f"for {num_devices} devices; got {count}"
            )
    names = sorted(domains)
    pools = {
        (name, split): _shuffled(getattr(domains[name], split), seed, name, split) for name in names for split in SPLITS
    }
    devices = []
    for index in range(num_devices):
        generator = np.random.default_rng(derive_seed(seed, "mixture", index))
        shares_D = generator.dirichlet(np.full(len(names), alpha))
        rows: dict[str, tuple[Example, ...]] = {}
        mixture: dict[str, int] = {}
        for split in SPLITS:
            counts = _counts(shares_D, wanted[split], np.array([len(pools[name, split]) for name in names]))
            drawn = [pools[name, split][:count] for name, count in zip(names, counts, strict=True)]
            for name, count in zip(names, counts, strict=True):
                del pools[name, split][:count]
            rows[split] = tuple(row for part in drawn for row in part)
            if split == "train":
                mixture = dict(zip(names, counts, strict=True))
        kept = {name: count for name, count in sorted(mixture.items(), key=lambda pair: -pair[1]) if count}
        device = f"device-{index + 1}"
        devices.append(DeviceRows(device, kept, rows["train"], rows["validation"], rows["test"], test_set=device))
    return devices


def _require_devices(count: int) -> None:
    if count < FEWEST_DEVICES:
        raise SetupError(f"expected at least {FEWEST_DEVICES} devices, got {count}")


def _sizes(sizes: int | Sequence[int], placed: Sequence[str]) -> list[int]:
    given = [sizes] * len(placed) if isinstance(sizes, int) else list(sizes)
    if len(given) != len(placed):
        raise SetupError(f"expected a size for each of {len(placed)} devices, got {len(given)}")
    if wrong := [size for size in given if size < 1]:
        raise SetupError(f"expected sizes of at least 1 row, got {wrong}")
    return given


def _limited(rows: tuple[Example, ...], limit: int | None, name: str, split: str) -> tuple[Example, ...]:
    """At most so many of the rows, in their order."""
    if limit is None or limit >= len(rows):
        return rows
    generator = np.random.default_rng(derive_seed(0, "limited rows", name, split))
    return tuple(rows[index] for index in sorted(generator.permutation(len(rows))[:limit].tolist()))


def _shuffled(rows: Sequence[Example], seed: int, name: str, split: str) -> list[Example]:
    generator = np.random.default_rng(derive_seed(seed, "rows", name, split))
    return [rows[index] for index in generator.permutation(len(rows)).tolist()]


def _counts(shares_D: np.ndarray, total: int, room_D: np.ndarray) -> list[int]:
    """Whole numbers close to `total * shares`, at most `room`, that add up to `total` (`room` does, or more)."""
    counts_D = np.zeros(len(shares_D), dtype=np.int64)
    while (missing := total - int(counts_D.sum())) > 0:
        open_D = counts_D < room_D
        # A share may be so small that it is 0 as a float; such domains are used once no other has rows.
        weights_D = np.where(open_D, np.maximum(shares_D, 1e-300), 0.0)
        ideal_D = weights_D / weights_D.sum() * missing
        step_D = np.minimum(np.floor(ideal_D).astype(np.int64), room_D - counts_D)
        if step_D.sum() == 0:
            order = np.argsort(-(ideal_D - np.floor(ideal_D)), kind="stable")
            step_D[[place for place in order if open_D[place]][:missing]] = 1
        counts_D += step_D
    return [int(count) for count in counts_D]
