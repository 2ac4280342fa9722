"""Federated averaging of adapter deltas, one update in memory at a time.

`theta_bar = theta + eta * sum_i w_i delta_i`, `w_i = n_i / sum n` (FedAvg, arXiv 1602.05629, with the server's learning
rate of arXiv 2003.00295). A and B of a LoRA adapter are averaged apart, as in FedIT (arXiv 2305.05644): that is not the
average of their products.

What limits the sum is memory: float64 sums move twice the bytes of float32 ones, and an adapter has hundreds of small
tensors, whose calls cost as much as their values. So all tensors lie in one float32 vector, as in the file that they
came from; up to `GROUP` updates are added up in float32, and each such group is added to float64 totals. A value's
error against the exact weighted mean is at most

    2^-24 [ (GROUP + 3) sum_i w_i |x_i| + |mean| ],

the first order of a sum of GROUP float32 numbers (Higham, Accuracy and Stability, 4.2), and so is, twice, what another
order of the devices changes: about one part in a million of the mean magnitude, whatever the number of updates.
(Beside it, where products fall below float32's range, up to 2^-149 times the group's largest weight an update.) Adding
in float64 throughout was 0.3 times as fast as float32, compensated (Kahan) sums slower still (see docs/results).

Memory is three times an adapter's float32 bytes, four where updates do not lie in one piece, and once more for the
result, whatever the number of devices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cotuning.adapters import AdapterState, add

RefusalCode = Literal[
    "wrong_tensor_names", "wrong_tensor_shape", "wrong_tensor_dtype", "non_finite_values", "norm_out_of_range"
]
_SHOWN = 5
GROUP = 16
"""Updates that are added up in float32 before they go into the float64 totals."""

_BLOCK = 2**17
"""Values at a time: their float64 copies, 1 MiB, stay in the processor's cache."""

_SMALLEST, _GREATEST = 1e-25, 1e30
"""Of a norm: between them float32 neither loses an update's values nor overflows in a group. Its square likewise."""


class UpdateRefused(ValueError):
    """An update that must not be counted.

    Attributes:
        code: why, in the words of the protocol's error codes.
        expected, received: the values that did not agree, shortened.
    """

    def __init__(self, code: RefusalCode, detail: str, *, expected: Any, received: Any) -> None:
        super().__init__(f"{detail}: expected {expected}, got {received}")
        self.code: RefusalCode = code
        self.expected = expected
        self.received = received


def check_update(
    delta: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, max_norm: float | None = None
) -> float:
    """Names, shapes and dtypes as in `expected`, every value finite, L2 norm at most `max_norm`; returns the norm.

    Raises:
        UpdateRefused: the first of these that fails.
    """
    _check_form(delta, {name: like.shape for name, like in expected.items()})
    return _checked_norm(delta, torch.cat([delta[name].reshape(-1) for name in expected]), max_norm)


def _check_form(delta: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    missing, unknown = sorted(expected.keys() - delta.keys()), sorted(delta.keys() - expected.keys())
    if missing or unknown:
        raise UpdateRefused(
            "wrong_tensor_names",
            f"{len(missing)} tensors missing, {len(unknown)} unknown",
            expected=(missing or sorted(expected))[:_SHOWN],
            received=(unknown or sorted(delta))[:_SHOWN],
        )
    for name, shape in expected.items():
        tensor = delta[name]
        if tensor.shape != shape:
            shapes = {"expected": list(shape), "received": list(tensor.shape)}
            raise UpdateRefused("wrong_tensor_shape", f"shape of {name}", **shapes)
        if tensor.dtype != torch.float32:
            raise UpdateRefused("wrong_tensor_dtype", f"dtype of {name}", expected="F32", received=str(tensor.dtype))


def _checked_norm(delta: Mapping[str, Tensor], flat_N: Tensor, max_norm: float | None) -> float:
    """The L2 norm of an update whose values may be counted.

    A quick float32 norm settles most: it is finite, so every value is; and far enough from the limit and from what
    float32 cannot hold. Its rounding error is far below the factor of two asked for; what is nearer is looked at
    exactly.
    """
    quick = math.sqrt(sum(float(block.dot(block)) for block in torch.split(flat_N, _BLOCK)))
    if _SMALLEST**0.5 < quick < math.inf and (max_norm is None or 2 * quick <= max_norm):
        return quick
    for name, tensor in delta.items():
        if not bool(torch.isfinite(tensor).all()):
            broken = int((~torch.isfinite(tensor)).sum())
            raise UpdateRefused("non_finite_values", name, expected="finite values", received=f"{broken} that are not")
    norm = update_norm(delta)
    if max_norm is not None and norm > max_norm:
        raise UpdateRefused("norm_out_of_range", "L2 norm", expected=f"at most {max_norm:g}", received=f"{norm:g}")
    return norm


def update_norm(delta: Mapping[str, Tensor]) -> float:
    """The L2 norm over all tensors together."""
    blocks = (block for tensor in delta.values() for block in torch.split(tensor.reshape(-1), _BLOCK))
    return math.sqrt(sum(float(wide.dot(wide)) for wide in (block.double() for block in blocks)))


class StreamingMean:
    """The weighted mean of updates that come one by one.

    Args:
        expected: tensors with the right names and shapes, for example theta; by default the first update sets them.
        max_norm: L2 norm over which an update is refused.
    """

    def __init__(self, expected: Mapping[str, Tensor] | None = None, *, max_norm: float | None = None) -> None:
        self._shapes = _shapes(expected) if expected is not None else None
        self._max_norm = max_norm
        self._sums: _GroupedSums | None = None
        self._scratch_N: Tensor | None = None
        self.weight = 0.0
        """Of all updates together."""
        self.num_updates = 0

    def add(self, delta: Mapping[str, Tensor], weight: float) -> float:
        """Count an update and return its L2 norm, to float32 rounding. One that is refused leaves no trace.

        Args:
            delta: float32, CPU. Not kept. Fastest where its tensors lie one behind the other in memory, sorted by name,
                as `read_tensors` gives them.
            weight: above zero; the number of examples.

        Raises:
            UpdateRefused: it does not fit, is not finite, or is too large.
            ValueError: the weight is not a positive finite number.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"expected a weight above 0, got {weight}")
        shapes = self._shapes or _shapes(delta)
        _check_form(delta, shapes)
        flat_N = self._flat([delta[name] for name in shapes])
        norm = _checked_norm(delta, flat_N, self._max_norm)
        if self._sums is None:
            self._sums = _GroupedSums(len(flat_N))
        self._sums.add(flat_N, weight, norm)
        self._shapes = shapes
        self.weight += weight
        self.num_updates += 1
        return norm

    def result(self) -> AdapterState:
        """The mean so far, float32; more updates may follow.

        Raises:
            ValueError: there was none.
        """
        if self._sums is None or self._shapes is None:
            raise ValueError("expected at least one update, got none")
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = torch.split(self._sums.mean(self.weight), sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors as one vector: a view where they lie so, else a copy in memory that is used again."""
        flat_N = _in_one_piece(tensors)
        if flat_N is not None:
            return flat_N
        if self._scratch_N is None:
            self._scratch_N = torch.empty(sum(tensor.numel() for tensor in tensors))
        return torch.cat([tensor.reshape(-1) for tensor in tensors], out=self._scratch_N)


class _GroupedSums:
    """Weighted sums of vectors: in float32 over a group, relative to the weight of its first, and those in float64.

    Relative, so that one update alone, and any whose weight is a power of two times the first's, is not rounded.
    """

    def __init__(self, size: int) -> None:
        self._total_N = torch.zeros(size, dtype=torch.float64)
        self._group_N = torch.empty(size)
        self._wide = torch.empty(min(size, _BLOCK), dtype=torch.float64)
        self._first_weight = 0.0
        self._count = 0

    def add(self, flat_N: Tensor, weight: float, norm: float) -> None:
        """Count `weight * flat`; `norm` is its L2 norm, finite."""
        ratio = weight / self._first_weight if self._count else 1.0
        if norm and not (norm * min(ratio, 1.0) > _SMALLEST and norm * max(ratio, 1.0) < _GREATEST):
            self._widen(flat_N, weight)
            return
        if self._count:
            self._group_N.add_(flat_N, alpha=ratio)
        else:
            self._group_N.copy_(flat_N)
            self._first_weight = weight
        self._count += 1
        if self._count == GROUP:
            self._close()

    def mean(self, weight: float) -> Tensor:
        """All sums so far over `weight`, float32."""
        self._close()
        mean_N = torch.empty_like(self._group_N)
        for place, total in zip(torch.split(mean_N, _BLOCK), torch.split(self._total_N, _BLOCK), strict=True):
            place.copy_(torch.div(total, weight, out=self._wide[: len(total)]))
        return mean_N

    def _close(self) -> None:
        if self._count:
            self._widen(self._group_N, self._first_weight)
            self._count = 0

    def _widen(self, flat_N: Tensor, weight: float) -> None:
        """`total += weight * flat` in float64; torch's own mixed addition would copy all of it to float64 first."""
        for total, block in zip(torch.split(self._total_N, _BLOCK), torch.split(flat_N, _BLOCK), strict=True):
            total.add_(self._wide[: len(block)].copy_(block), alpha=weight)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in sorted(tensors.items())}


def _in_one_piece(tensors: Sequence[Tensor]) -> Tensor | None:
    """One vector over tensors that lie one behind the other in one storage; None where they do not."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros(0)
    first, place = filled[0], filled[0].data_ptr()
    for tensor in filled:
        if tensor.data_ptr() != place or not tensor.is_contiguous():
            return None
        place += tensor.nbytes
    size = (place - first.data_ptr()) // first.element_size()
    storage = first.untyped_storage()
    if place > storage.data_ptr() + storage.nbytes():
        return None
    return first.as_strided((size,), (1,))


def apply_server_update(
    shared: Mapping[str, Tensor], mean_delta: Mapping[str, Tensor], learning_rate: float
) -> AdapterState:
    """`shared + learning_rate * mean_delta`.

    Raises:
        AdapterMismatch: other names or shapes.
    """
    return add(shared, mean_delta, scale=learning_rate)
