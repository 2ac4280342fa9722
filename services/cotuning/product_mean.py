"""The mean of LoRA products, B_i A_i, instead of the mean of their factors, re-factored to the run's rank.

An adapter adds `s B A`, s = alpha / r, to a weight (LoRA, arXiv 2106.09685). FedAvg of A and B apart gives
`mean(B) mean(A)`, which is not `mean(B A)`. Device i starts from A_i0, B_i0 and sends `dA_i`, `dB_i`, so it has changed
the weight by

    s_i [(B_i0 + dB_i)(A_i0 + dA_i) - B_i0 A_i0] = s_i [B_i0 dA_i + dB_i A_i0 + dB_i dA_i].

The new adapter is to add, with learning rate eta and w_i = n_i / sum n,

    P = s B A + eta * sum_i w_i s_i [B_i0 dA_i + dB_i A_i0 + dB_i dA_i].

All devices of one rank start from the same A_i0, B_i0, so the first two sums of the bracket are products with mean
deltas: exact, and of fixed rank. Only the last, of second order, is a stack that grows with the devices (FLoRA, arXiv
2409.05976) and is compressed beyond a bound (`low_rank.ProductSum`). At the end P / s is cut to rank r by singular
values; what that loses is reported. FLoRA itself sends the whole stack to the devices, whose adapters grow; a run's
adapter has one shape for all its rounds, hence the cut.

Devices of other ranks: one of rank k < r starts from the first k components of A and B (HetLoRA, arXiv 2401.06432), one
of rank k > r from A with fresh rows and B with zero columns. B is scaled by k / r, because peft scales the product by
alpha / k. So alpha itself never enters. Components are ordered by singular value before they go out
(`by_singular_values`), so that the first k are the best cut; only the server does that, as two machines' libraries may
turn the same product into different factors, and a device's dA means nothing beside another B_i0.

The bracket is what device i changed of what it saw. What the cut hid from it, s (B A - its first k components), is in
s B A and stays: counted as `B_i A_i - B A` it would be the device's vote to forget what it never read. HetLoRA instead
pads A and B with zeros and averages them apart, which shrinks what few devices train; stacking products does not.

Names: O output features, I input features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cotuning.adapters import AdapterState
from cotuning.aggregation import StreamingMean, UpdateRefused
from cotuning.low_rank import ProductSum, Truncation, product_norm, truncate_product
from cotuning.seeding import derive_seed

_LEFT, _RIGHT = ".lora_B.", ".lora_A."
_PROBES = 16
_NO_PRODUCT = 1e-7
"""Of the greatest row's norm, the square root of a singular value: 1e-14 of the product is its rounding."""


@dataclass(frozen=True)
class Refactored:
    """A mean of products as an adapter of the run's rank.

    Attributes:
        adapter: float32; components by falling singular value, A and B balanced.
        relative_error: Frobenius norm of (adapter's products - exact products), all layers together, relative to the
            exact ones'. Exact but for rounding where nothing was compressed on the way; else estimated by random probes
            (`ProductSum.lost`), within a few percent for an adapter of many layers.
        error_bound: what it cannot exceed; the same where nothing was compressed.
        update_error: the error relative to the mean update, `P - s B A`: what the cut took of this round's learning.
    """

    adapter: AdapterState
    relative_error: float
    error_bound: float
    update_error: float


def lora_pairs(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of each layer's A by the name of its B, sorted.

    Raises:
        ValueError: a tensor that is not one of a pair with a common rank.
    """
    pairs = {name: name.replace(_LEFT, _RIGHT) for name in sorted(state) if _LEFT in name}
    alone = {left for left, right in pairs.items() if right not in state}
    strange = sorted(alone | (state.keys() - pairs.keys() - set(pairs.values())))
    if strange:
        raise ValueError(f"expected pairs of lora_A and lora_B, got {', '.join(strange[:5])} without a partner")
    for left, right in pairs.items():
        shapes = list(state[left].shape), list(state[right].shape)
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][0]:
            raise ValueError(f"expected shapes [O, R] and [R, I] of {left} and its A, got {shapes[0]} and {shapes[1]}")
    return pairs


def at_rank(state: Mapping[str, Tensor], rank: int, *, seed: int) -> AdapterState:
    """The adapter from which a device of rank `rank` starts: equal bits on the device and on the server.

    Args:
        state: the run's shared adapter, of any rank r.
        rank: k. Below r: the first k components. Above: all, and `k - r` more whose product is zero (A as peft
            initialises it, uniform within 1 / sqrt(I); B zero). Equal: the adapter itself.
        seed: of the fresh rows of A; the run's.

    Raises:
        ValueError: the state is no LoRA adapter, or a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}")
    resized: AdapterState = {}
    for left, right in lora_pairs(state).items():
        left_OR, right_RI = state[left], state[right]
        own, inputs = right_RI.shape
        if rank != own:
            left_OR = left_OR[:, :rank] * (rank / own)
            right_RI = right_RI[:rank]
        if rank > own:
            generator = torch.Generator().manual_seed(derive_seed(seed, "fresh_rows", right))
            fresh_FI = (2 * torch.rand(rank - own, inputs, generator=generator) - 1) / inputs**0.5
            left_OR = torch.cat([left_OR, left_OR.new_zeros(len(left_OR), rank - own)], 1)
            right_RI = torch.cat([right_RI, fresh_FI])
        resized |= {left: left_OR, right: right_RI}
    return resized


def by_singular_values(state: Mapping[str, Tensor]) -> AdapterState:
    """The same products, to float32 rounding, from components by falling singular value, A and B balanced.

    A component without a product keeps a row of A, as in `ProductMean.result`; a layer without any stays as it is.

    Raises:
        ValueError: the state is no LoRA adapter.
    """
    ordered: AdapterState = {}
    for left, right in lora_pairs(state).items():
        left_OR, right_RI = state[left], state[right].double()
        cut = truncate_product(left_OR, right_RI, len(right_RI))
        if cut.norm == 0:
            ordered |= {left: left_OR.clone(), right: state[right].clone()}
            continue
        left_OR, right_RI = _able_to_learn(cut, right_RI)
        ordered |= {left: left_OR.float(), right: right_RI.float()}
    return dict(sorted(ordered.items()))


def resized(state: Mapping[str, Tensor], rank: int, *, seed: int) -> AdapterState:
    """`at_rank` for an adapter whose components come in any order: cut to the greatest ones."""
    same = all(state[right].shape[0] == rank for right in lora_pairs(state).values())
    return dict(state) if same else at_rank(by_singular_values(state), rank, seed=seed)


def update_rank(delta: Mapping[str, Tensor], *, max_rank: int) -> int:
    """The one rank of all layers of an update.

    Raises:
        UpdateRefused: there are several, or none, or it is above `max_rank`.
    """
    ranks = {tensor.shape[0] for name, tensor in delta.items() if _RIGHT in name and tensor.dim()}
    if len(ranks) != 1 or not 1 <= min(ranks) <= max_rank:
        raise UpdateRefused(
            "wrong_tensor_shape", "rank of the update", expected=f"one in 1..{max_rank}", received=sorted(ranks)
        )
    return ranks.pop()


class ProductMean:
    """The weighted mean of updates' products that come one by one; the module's docstring has the formula.

    Memory: sums of one adapter a rank, and a stack of at most `max_stack_rank` a layer, whatever the number of
    devices. Up to that, the result does not depend on their order but for rounding.

    Args:
        base: theta_t, float32.
        max_norm: L2 norm over which an update is refused.
        max_rank: of a device's update; by default only the base's own.
        max_stack_rank: of the second-order terms, R in `ProductSum`; by default 8 updates of `max_rank`.
        seed: as in `at_rank`.

    Raises:
        ValueError: the base is no LoRA adapter of one rank.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        *,
        max_norm: float | None = None,
        max_rank: int | None = None,
        max_stack_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        self._base = dict(base)
        self._pairs = lora_pairs(base)
        ranks = {base[right].shape[0] for right in self._pairs.values()}
        if len(ranks) != 1:
            raise ValueError(f"expected an adapter of one rank, got {sorted(ranks)}")
        self._rank = ranks.pop()
        self._max_norm = max_norm
        self._max_rank = max_rank
        self._seed = seed
        self._means: dict[int, tuple[AdapterState, StreamingMean]] = {}
        stack = max_stack_rank if max_stack_rank is not None else 8 * (max_rank or self._rank)
        self._probes = {left: _probes(left, base[right]) for left, right in self._pairs.items()}
        self._second_order = {left: ProductSum(stack, self._probes[left]) for left in self._pairs}

    @property
    def num_updates(self) -> int:
        """Counted so far."""
        return sum(mean.num_updates for _, mean in self._means.values())

    def add(self, delta: Mapping[str, Tensor], weight: float, *, rank: int | None = None) -> float:
        """Count an update and return its L2 norm. One that is refused leaves no trace.

        Args:
            delta: `dA_i` and `dB_i`, float32, CPU.
            weight: above zero; the number of examples.
            rank: that it must have; by default the base's own, or any up to `max_rank` where that is set.

        Raises:
            UpdateRefused: it does not fit, is not finite, or is too large.
            ValueError: the weight is not a positive finite number.
        """
        if rank is None:
            rank = self._rank if self._max_rank is None else update_rank(delta, max_rank=self._max_rank)
        if rank in self._means:
            start, mean = self._means[rank]
        else:
            start = self._base if rank == self._rank else at_rank(self._base, rank, seed=self._seed)
            mean = StreamingMean(start, max_norm=self._max_norm)
        norm = mean.add(delta, weight)
        self._means[rank] = start, mean
        for left, right in self._pairs.items():
            self._second_order[left].add(delta[left], delta[right], weight * self._rank / rank)
        return norm

    def result(self, learning_rate: float = 1.0) -> Refactored:
        """The new adapter, of the base's rank; more updates may follow.

        An update that is zero everywhere gives the base back as it is. Where P has a lower rank than the run's, the
        spare components keep a row of A with a zero column of B, so that they can still learn.

        Raises:
            ValueError: there was no update.
        """
        stack = self._stack(learning_rate)
        adapter: AdapterState = {}
        errors: list[tuple[float, float, float, float]] = []
        for left, right in self._pairs.items():
            base_OR, base_RI = self._base[left].double(), self._base[right].double()
            update_norm = product_norm(*stack[left])
            if update_norm == 0:
                adapter |= {left: self._base[left].clone(), right: self._base[right].clone()}
                errors.append((0.0, 0.0, product_norm(base_OR, base_RI), 0.0))
                continue
            whole = torch.cat([base_OR, stack[left][0]], 1), torch.cat([base_RI, stack[left][1]])
            cut = truncate_product(*whole, self._rank)
            left_OR, right_RI = _able_to_learn(cut, base_RI)
            adapter |= {left: left_OR.float(), right: right_RI.float()}
            errors.append((*self._error(left, whole, cut, learning_rate), cut.norm, update_norm))
        found, bounds, norms, updates = (torch.tensor(each, dtype=torch.float64) for each in zip(*errors, strict=True))
        return Refactored(
            dict(sorted(adapter.items())),
            relative_error=_ratio(found, norms),
            error_bound=_ratio(bounds, norms),
            update_error=_ratio(found, updates),
        )

    def _error(
        self, left: str, whole: tuple[Tensor, Tensor], cut: Truncation, learning_rate: float
    ) -> tuple[float, float]:
        """Of one layer's `P / s`: the Frobenius norm of the error, or its estimate, and its bound."""
        terms, scale = self._second_order[left], learning_rate / self._weight()
        if terms.error == 0:
            return cut.error, cut.error
        bound = cut.error + scale * terms.error
        cut_OJ = whole[0] @ (whole[1] @ self._probes[left]) - cut.left_OK @ (cut.right_KI @ self._probes[left])
        error_OJ = scale * terms.lost() + cut_OJ
        return min(bound, float(torch.linalg.vector_norm(error_OJ)) / _PROBES**0.5), bound

    def _weight(self) -> float:
        return sum(mean.weight for _, mean in self._means.values())

    def stacked(self, learning_rate: float = 1.0) -> AdapterState:
        """The exact P as an adapter of greater rank, nothing cut off (FLoRA): the base's components, then the stack's.

        B is scaled so that peft, with the run's alpha and this rank, adds P.

        Raises:
            ValueError: there was no update.
        """
        adapter: AdapterState = {}
        for left, (left_OR, right_RI) in self._stack(learning_rate).items():
            right = self._pairs[left]
            rank = self._rank + left_OR.shape[1]
            whole_OR = torch.cat([self._base[left].double(), left_OR], 1) * (rank / self._rank)
            adapter[left] = whole_OR.float()
            adapter[right] = torch.cat([self._base[right].double(), right_RI]).float()
        return dict(sorted(adapter.items()))

    def _stack(self, learning_rate: float) -> dict[str, tuple[Tensor, Tensor]]:
        """The exact sum, `(P - s B A) / s` of each layer, as thin factors (but for what compression cut)."""
        if not self.num_updates:
            raise ValueError("expected at least one update, got none")
        total = self._weight()
        parts = [
            (learning_rate * mean.weight / total * self._rank / rank, start, mean.result())
            for rank, (start, mean) in sorted(self._means.items())
        ]
        stack: dict[str, tuple[Tensor, Tensor]] = {}
        for left, right in self._pairs.items():
            second_left_OR, second_right_RI = self._second_order[left].factors()
            lefts_OR, rights_RI = [second_left_OR * (learning_rate / total)], [second_right_RI]
            for share, start, delta in parts:
                lefts_OR += [share * start[left].double(), share * delta[left].double()]
                rights_RI += [delta[right].double(), start[right].double()]
            stack[left] = torch.cat(lefts_OR, 1), torch.cat(rights_RI)
        return stack


def _able_to_learn(cut: Truncation, base_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The cut's factors, where a component without a product gets a zero column of B and a row of A that is not zero.

    Both zero would never learn again: each is the other's gradient. The rows are what the base's A has outside the
    components in use, of its rows' average norm.
    """
    norms_K = torch.linalg.vector_norm(cut.right_KI, dim=1)
    spare_K = norms_K <= _NO_PRODUCT * norms_K.max()
    spare = int(spare_K.sum())
    if not spare:
        return cut.left_OK, cut.right_KI
    used_KI = cut.right_KI[~spare_K] / norms_K[~spare_K, None]
    outside_RI = base_RI - base_RI @ used_KI.T @ used_KI
    rows_FI = truncate_product(torch.eye(len(base_RI), dtype=torch.float64), outside_RI, spare).right_KI
    rows_FI = torch.nn.functional.normalize(rows_FI, dim=1) * torch.linalg.vector_norm(base_RI) / len(base_RI) ** 0.5
    left_OK, right_KI = cut.left_OK.clone(), cut.right_KI.clone()
    left_OK[:, spare_K] = 0.0
    right_KI[spare_K] = rows_FI
    return left_OK, right_KI


def _probes(layer: str, right_RI: Tensor) -> Tensor:
    """Standard normal [I, J], the same each time for a layer and another one for each."""
    generator = torch.Generator().manual_seed(derive_seed(0, "probes", layer))
    return torch.randn(right_RI.shape[1], _PROBES, generator=generator, dtype=torch.float64)


def _ratio(errors_L: Tensor, norms_L: Tensor) -> float:
    """Of two Frobenius norms over all layers."""
    error, norm = float(torch.linalg.vector_norm(errors_L)), float(torch.linalg.vector_norm(norms_L))
    return error / norm if norm else float(error > 0)
