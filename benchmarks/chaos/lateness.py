"""Late updates: each in at most one round, as old as it is said to be; and every update with its weight.

The weights are computed here once more, with NumPy: the mean of the deltas that the store has, each weighing its
examples times (1 + k)^-a, must be the round's step.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from benchmarks.chaos.history import History
from persistence.blobs import FolderBlobStore
from persistence.tables import AssignmentRow, RoundRow
from protocol.statuses import AssignmentStatus, RoundStatus

TOLERANCE = 1e-6
"""Of an adapter's values, which are float32 and near 1; a wrong weight moves them by some 1e-4."""

Tensors = Mapping[str, NDArray[np.float32]]


def violations(history: History, blobs: FolderBlobStore) -> list[str]:
    """Return what is wrong with a run's late updates and with the weights of all; nothing if all is well."""
    found = _used(history)
    for row in history.rounds:
        if row.status is RoundStatus.PUBLISHED and row.aggregated_adapter_sha256 is not None:
            found += _mean(history, row, blobs)
    return found


def _used(history: History) -> list[str]:
    rounds = {row.id: row for row in history.rounds}
    found: list[str] = []
    for each in history.assignments:
        if each.used_in_round_id is None:
            if each.staleness is not None:
                found.append(f"assignment {each.id} is {each.staleness} versions late, and no round used it")
            continue
        own, user = rounds[each.round_id], rounds.get(each.used_in_round_id)
        if user is None or user.id == own.id:
            found.append(f"assignment {each.id} of round {own.number} is used late in {each.used_in_round_id}")
            continue
        if each.status is AssignmentStatus.COUNTED and user.status is not RoundStatus.PUBLISHED:
            found.append(f"assignment {each.id} was counted by round {user.number}, which is {user.status.value}")
        if each.staleness != (age := _age(history, own.base_version, user.base_version)):
            found.append(f"assignment {each.id} is {age} versions old in round {user.number}, not {each.staleness}")
    for row in history.rounds:
        told = row.metrics.get("late_updates", {})
        used = {
            each.id: each.staleness
            for each in history.assignments
            if each.used_in_round_id == row.id and each.status is AssignmentStatus.COUNTED
        }
        if row.status is RoundStatus.PUBLISHED and told != used:
            found.append(f"round {row.number} says that it used {told}; the assignments say {used}")
    return found


def _age(history: History, base: int, current: int) -> int | None:
    """Return how many versions lie between, on the way from `current` back to version 0; None: `base` is not on it."""
    parents = {version.number: version.parent for version in history.versions}
    steps, at = 0, current
    while at != base:
        parent = parents.get(at)
        if parent is None:
            return None
        steps, at = steps + 1, parent
    return steps


def _mean(history: History, row: RoundRow, blobs: FolderBlobStore) -> list[str]:
    counted = [each for each in history.assignments if _counted_in(each, row)]
    exponent = float(history.run.config["staleness_exponent"])
    rate = float(history.run.config["strategy"]["server_learning_rate"])
    hashes = [
        row.base_adapter_sha256,
        row.aggregated_adapter_sha256,
        *(history.deltas.get(each.id) for each in counted),
    ]
    if missing := [sha256 for sha256 in hashes if sha256 is None or not blobs.exists(sha256)]:
        return [f"round {row.number}: the store lacks {missing}"]
    base, made, *deltas = (load(blobs.path(str(sha256)).read_bytes()) for sha256 in hashes)
    weights = [(each.num_examples or 0) * (1 + (each.staleness or 0)) ** -exponent for each in counted]
    off = distance(base, made, deltas, weights, rate)
    return [f"round {row.number}: its step is {off:.1e} off the weighted mean"] if off > TOLERANCE else []


def _counted_in(each: AssignmentRow, row: RoundRow) -> bool:
    return each.status is AssignmentStatus.COUNTED and row.id == (each.used_in_round_id or each.round_id)


def distance(
    base: Tensors, made: Tensors, deltas: Sequence[Tensors], weights: Sequence[float], rate: float = 1.0
) -> float:
    """Return the largest difference between `made` and `base` plus `rate` times the weighted mean of the deltas."""
    total = sum(weights)
    largest = 0.0
    for name, value in base.items():
        step = sum(weight * delta[name].astype(np.float64) for weight, delta in zip(weights, deltas, strict=True))
        largest = max(largest, float(np.abs(value + rate * step / total - made[name]).max()))
    return largest
