"""Sums of low-rank matrices, kept as thin factors: the full O x I matrix is never formed.

Names: O output features, I input features, R rank of a factorisation (columns of the left factor, rows of the right), J
random probes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Truncation:
    """The best approximation of a product by one of lower rank.

    Attributes:
        left_OK, right_KI: float64; balanced, so that row k of the right and column k of the left have the same norm,
            the square root of the k-th singular value; greatest first. Zero where the product has no such rank.
        error: Frobenius norm of what was cut off.
        norm: Frobenius norm of the whole product.
    """

    left_OK: Tensor
    right_KI: Tensor
    error: float
    norm: float


def truncate_product(left_OR: Tensor, right_RI: Tensor, rank: int) -> Truncation:
    """The rank-`rank` matrix nearest to `left @ right` in the Frobenius norm (Eckart and Young, 1936).

    With `left = Q_l R_l` and `right.T = Q_r R_r`, the product's singular values are those of the R x R matrix
    `R_l R_r.T`. Signs are fixed (the greatest entry of each left vector is positive), so that the factors do not depend
    on the library that computed them where the singular values are distinct.

    Args:
        left_OR: any float dtype; computed in float64.
        right_RI: likewise.
        rank: K, at least 1; more than the product can have is filled up with zeros.

    Raises:
        ValueError: factors that cannot be multiplied, or a rank below 1.
    """
    if rank < 1 or left_OR.dim() != 2 or right_RI.dim() != 2 or left_OR.shape[1] != right_RI.shape[0]:
        shapes = f"{list(left_OR.shape)} and {list(right_RI.shape)}"
        raise ValueError(f"expected factors [O, R] and [R, I] and a rank of at least 1, got {shapes} and {rank}")
    left_q, left_r = torch.linalg.qr(left_OR.double())
    right_q, right_r = torch.linalg.qr(right_RI.double().T)
    inner_left, singular, inner_right = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    kept = min(rank, len(singular))
    left_OK = left_q @ inner_left[:, :kept]
    right_KI = inner_right[:kept] @ right_q.T
    greatest_K = left_OK.gather(0, left_OK.abs().argmax(0, keepdim=True)).squeeze(0)
    signs_K = torch.where(greatest_K < 0, -1.0, 1.0)
    scale_K = singular[:kept].sqrt()
    return Truncation(
        _padded(left_OK * (signs_K * scale_K), rank, dim=1),
        _padded(right_KI * (signs_K * scale_K)[:, None], rank, dim=0),
        error=float(torch.linalg.vector_norm(singular[kept:])),
        norm=float(torch.linalg.vector_norm(singular)),
    )


def product_norm(left_OR: Tensor, right_RI: Tensor) -> float:
    """The Frobenius norm of `left @ right`."""
    left_r = torch.linalg.qr(left_OR.double(), mode="r").R
    right_r = torch.linalg.qr(right_RI.double().T, mode="r").R
    return float(torch.linalg.vector_norm(left_r @ right_r.T))


def _padded(factor: Tensor, rank: int, *, dim: int) -> Tensor:
    missing = list(factor.shape)
    missing[dim] = rank - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(missing)], dim) if missing[dim] else factor


class ProductSum:
    """`sum_i w_i L_i R_i`, exact while the ranks together are at most `max_rank`.

    Terms are stacked, `[w_1 L_1, w_2 L_2, ...] [R_1; R_2; ...]`, which is their exact sum (FLoRA, arXiv 2409.05976).
    When the stack outgrows `max_rank` it is truncated to half of it; that is ours. Each truncation is the best of its
    rank, and the Frobenius norms of what they cut off add up to a bound on the error (triangle inequality): zero where
    half of `max_rank` is at least O or I. Beyond `max_rank` the sum depends on the order of the terms, by at most the
    sum of both orders' bounds.

    Args:
        max_rank: of the stack, at least 2; memory is `max_rank * (O + I)` values, whatever the number of terms.
        probes_IJ: standard normal, float64; what the exact sum makes of them is kept beside the stack, so that the
            error can be estimated and not only bounded: `lost`.
    """

    def __init__(self, max_rank: int, probes_IJ: Tensor) -> None:
        if max_rank < 2:
            raise ValueError(f"expected a stack of at least rank 2, got {max_rank}")
        self._max_rank = max_rank
        self._terms: list[tuple[Tensor, Tensor, float]] = []
        self._probes_IJ = probes_IJ
        self._probed_OJ: Tensor | None = None
        self.error = 0.0
        """Bound on the Frobenius norm of (this sum - the exact one)."""

    @property
    def rank(self) -> int:
        """Of the stack."""
        return sum(left_OR.shape[1] for left_OR, _, _ in self._terms)

    def add(self, left_OR: Tensor, right_RI: Tensor, weight: float) -> None:
        """Add `weight * left @ right`. The factors are copied."""
        self._terms.append((left_OR.clone(), right_RI.clone(), weight))
        if self._probed_OJ is None:
            self._probed_OJ = left_OR.new_zeros(len(left_OR), self._probes_IJ.shape[1], dtype=torch.float64)
        self._probed_OJ.addmm_(left_OR.double(), right_RI.double() @ self._probes_IJ, alpha=weight)
        if self.rank > self._max_rank:
            rank = min(self._max_rank // 2, left_OR.shape[0], right_RI.shape[1])
            cut = truncate_product(*self.factors(), rank=rank)
            self._terms = [(cut.left_OK, cut.right_KI, 1.0)]
            self.error += cut.error

    def lost(self) -> Tensor:
        """`(exact sum - this sum) @ probes`, [O, J]: its Frobenius norm over sqrt(J) estimates the error's.

        The square is unbiased, with a relative standard deviation of at most sqrt(2 / J).

        Raises:
            ValueError: nothing was added.
        """
        left_OR, right_RI = self.factors()
        assert self._probed_OJ is not None
        return self._probed_OJ - left_OR @ (right_RI @ self._probes_IJ)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The stack: left [O, R] and right [R, I], float64.

        Raises:
            ValueError: nothing was added.
        """
        if not self._terms:
            raise ValueError("expected at least one term, got none")
        lefts = [left_OR.double() * weight for left_OR, _, weight in self._terms]
        return torch.cat(lefts, 1), torch.cat([right_RI.double() for _, right_RI, _ in self._terms], 0)
