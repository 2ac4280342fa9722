"""Federated averaging of adapter deltas, one update in memory at a time.

`theta_bar = theta + eta * sum_i w_i delta_i`, `w_i = n_i / sum n` (FedAvg, arXiv 1602.05629, with the server's learning
rate of arXiv 2003.00295). A and B of a LoRA adapter are averaged apart, as in FedIT (arXiv 2305.05644): that is not the
average of their products.

Sums are kept in float64, so that the rounded result does not depend on the order in which devices answered, short of a
tie at the last bit. Float32 sums would be two to three times faster, but reading an update costs more than adding it;
compensated (Kahan) float32 sums are slower than float64 (`make bench-aggregation`). Memory is twice an adapter,
whatever the number of devices.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from cotuning.adapters import AdapterState, add

RefusalCode = Literal[
    "wrong_tensor_names", "wrong_tensor_shape", "wrong_tensor_dtype", "non_finite_values", "norm_out_of_range"
]
_SHOWN = 5
_BLOCK = 2**18
"""Values at a time: their float64 copies, 2 MiB, stay in the processor's cache."""


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


def check_update(delta: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, max_norm: float | None = None) -> None:
    """Names, shapes and dtypes as in `expected`, every value finite, L2 norm at most `max_norm`.

    Raises:
        UpdateRefused: the first of these that fails.
    """
    missing, unknown = sorted(expected.keys() - delta.keys()), sorted(delta.keys() - expected.keys())
    if missing or unknown:
        raise UpdateRefused(
            "wrong_tensor_names",
            f"{len(missing)} tensors missing, {len(unknown)} unknown",
            expected=(missing or sorted(expected))[:_SHOWN],
            received=(unknown or sorted(delta))[:_SHOWN],
        )
    for name, like in expected.items():
        tensor = delta[name]
        if tensor.shape != like.shape:
            shapes = {"expected": list(like.shape), "received": list(tensor.shape)}
            raise UpdateRefused("wrong_tensor_shape", f"shape of {name}", **shapes)
        if tensor.dtype != torch.float32:
            raise UpdateRefused("wrong_tensor_dtype", f"dtype of {name}", expected="F32", received=str(tensor.dtype))
    if not _plainly_small(delta, max_norm):
        _check_values(delta, max_norm)


def _plainly_small(delta: Mapping[str, Tensor], max_norm: float | None) -> bool:
    """Whether a quick float32 norm settles it: finite, so every value is, and far from the limit.

    Its rounding error is far below the factor of two that is asked for here; what is nearer is looked at exactly.
    """
    norm = float(get_total_norm(list(delta.values())))
    return math.isfinite(norm) and (max_norm is None or 2 * norm <= max_norm)


def _check_values(delta: Mapping[str, Tensor], max_norm: float | None) -> None:
    for name, tensor in delta.items():
        if not bool(torch.isfinite(tensor).all()):
            broken = int((~torch.isfinite(tensor)).sum())
            raise UpdateRefused("non_finite_values", name, expected="finite values", received=f"{broken} that are not")
    norm = update_norm(delta)
    if max_norm is not None and norm > max_norm:
        raise UpdateRefused("norm_out_of_range", "L2 norm", expected=f"at most {max_norm:g}", received=f"{norm:g}")


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
        self._expected = expected
        self._max_norm = max_norm
        self._sums: dict[str, Tensor] = {}
        self.weight = 0.0
        """Of all updates together."""
        self.num_updates = 0

    def add(self, delta: Mapping[str, Tensor], weight: float) -> None:
        """Count an update. One that is refused leaves no trace.

        Args:
            delta: float32, CPU.
            weight: above zero; the number of examples.

        Raises:
            UpdateRefused: it does not fit, is not finite, or is too large.
            ValueError: the weight is not a positive finite number.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"expected a weight above 0, got {weight}")
        check_update(delta, self._sums or self._expected or delta, max_norm=self._max_norm)
        for name, tensor in delta.items():
            if name in self._sums:
                _add_weighted(self._sums[name], tensor, weight)
            else:
                self._sums[name] = tensor.to(torch.float64) * weight
        self.weight += weight
        self.num_updates += 1

    def result(self) -> AdapterState:
        """The mean so far, float32; more updates may follow.

        Raises:
            ValueError: there was none.
        """
        if not self.num_updates:
            raise ValueError("expected at least one update, got none")
        return {name: (total / self.weight).to(torch.float32) for name, total in sorted(self._sums.items())}


def _add_weighted(total: Tensor, tensor: Tensor, weight: float) -> None:
    """`total += weight * tensor` in float64; torch copies to float64 first, and so only a block at a time."""
    if tensor.numel() <= _BLOCK:
        total.add_(tensor, alpha=weight)
        return
    for place, block in zip(torch.split(total.view(-1), _BLOCK), torch.split(tensor.reshape(-1), _BLOCK), strict=True):
        place.add_(block, alpha=weight)


def apply_server_update(
    shared: Mapping[str, Tensor], mean_delta: Mapping[str, Tensor], learning_rate: float
) -> AdapterState:
    """`shared + learning_rate * mean_delta`.

    Raises:
        AdapterMismatch: other names or shapes.
    """
    return add(shared, mean_delta, scale=learning_rate)
