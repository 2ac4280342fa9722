"""LM heads, and one model's half of a chunked loss: from hidden rows to class distributions, and back to gradients.

Names: S rows, D hidden size, V token ids, N rows of one chunk, C classes.

A loss that needs logits of many positions must not keep them: at V = 150k one float32 row is 600 kB. `FoldedHead`
projects a chunk of rows, folds it, takes the loss's slope over classes back through fold, soft-cap, scale and head at
once, and forgets the chunk (the pattern of Liger-Kernel's fused linear losses). The price: one backward pass per call,
no double backward.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Head:
    """An LM head, as far as logits depend on it: `soft_cap(logit_scale * (W h + bias))`, the first `num_tokens` ids.

    Attributes:
        weight_VD: may have more rows than the tokenizer has ids; those are never looked at.
        num_tokens: ids of the tokenizer (`TokenTable.num_tokens`).
        bias_V: or None.
        logit_scale: factor on the raw logits (Cohere multiplies, Granite divides: give the inverse).
        soft_cap: c in `c tanh(z / c)` (Gemma 2), or None.
    """

    weight_VD: Tensor
    num_tokens: int
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.weight_VD.shape[0] < self.num_tokens:
            raise ValueError(
                f"expected a head with a row for each of {self.num_tokens} token ids, got {self.weight_VD.shape[0]}"
            )


class FoldedHead:
    """One model's hidden rows, head and fold; class distributions and gradients chunk by chunk.

    Args:
        hidden_SD: hidden states, any float dtype.
        head: the head; its weight and bias get gradients only if they require them.
        map_V: class of each id, or None where classes are ids.
        num_classes: C.
        temperature: logits are divided by it before the softmax.
        scale: factor of the loss over classes; 0 means that nothing is learnt from them.
        target_S: the token that each row predicts, below 0 where none is counted. Their cross-entropy, at temperature
            one and over ids, is then formed from the same logits. None for no cross-entropy.
        token_scale: factor of the cross-entropy.
    """

    def __init__(
        self,
        hidden_SD: Tensor,
        head: Head,
        map_V: Tensor | None,
        num_classes: int,
        *,
        temperature: float,
        scale: float,
        target_S: Tensor | None = None,
        token_scale: float = 0.0,
    ) -> None:
        self._inputs = (hidden_SD, head.weight_VD, head.bias_V)
        self._head = head
        self._map_V = map_V
        self._num_classes = num_classes
        self._temperature = temperature
        self._target_S = target_S
        self._token_scale = token_scale
        self.scale = scale
        float64 = torch.float64 in (hidden_SD.dtype, head.weight_VD.dtype)
        self.dtype = torch.float64 if float64 else torch.float32
        self._value = torch.zeros((), dtype=self.dtype, device=hidden_SD.device)
        self._token_value = torch.zeros_like(self._value)
        wanted = torch.is_grad_enabled() and any(_wants_gradient(x) for x in self._inputs)
        self.learns = wanted and bool(scale or token_scale)
        self._probs_NV: Tensor | None = None
        self._token_probs_NV: Tensor | None = None
        self._tanh_NV: Tensor | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Cast what every chunk reads, once, and make room for the gradients."""
        hidden_SD, weight_VD, bias_V = self._inputs
        device_type = hidden_SD.device.type
        if torch.is_autocast_enabled(device_type) and self.dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        else:
            dtype = torch.promote_types(hidden_SD.dtype, weight_VD.dtype)
        num_tokens = self._head.num_tokens
        self._hidden_SD = hidden_SD.detach().to(dtype)
        self._weight_VD = weight_VD.detach()[:num_tokens].to(dtype)
        self._bias_V = None if bias_V is None else bias_V.detach()[:num_tokens].to(self.dtype)
        self._gradients: list[Tensor | None] = [None, None, None]
        for place, tensor in enumerate(self._inputs):
            if self.learns and tensor is not None and tensor.requires_grad:
                # Hidden rows are written once; head gradients are sums over chunks and need the wider type.
                kind = tensor.dtype if place == 0 else self.dtype
                self._gradients[place] = torch.zeros(tensor.shape, dtype=kind, device=tensor.device)

    def forward_only(self) -> ExitStack:
        """Inside, no graph is recorded and no cast is automatic: what `class_log_probs` and `accumulate` need."""
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(self._hidden_SD.device.type, enabled=False))
        return stack

    def chunks(self, chunk_rows: int, weights_S: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
        """The rows in chunks, with each chunk's weights."""
        for start in range(0, len(self._hidden_SD), chunk_rows):
            rows = slice(start, start + chunk_rows)
            yield rows, None if weights_S is None else weights_S[rows].to(self.dtype)

    def fold_onto(self, map_V: Tensor | None, num_classes: int) -> None:
        """Use other classes for the chunks that follow."""
        self._map_V = map_V
        self._num_classes = num_classes

    def class_log_probs(self, rows: slice | Tensor) -> Tensor:
        """Folded log-probabilities [N, C] of a chunk; keeps what `accumulate` needs until the next chunk.

        Adds the chunk's cross-entropy, where there are targets.
        """
        logits_NV = self._logits(rows)
        below_N = self._below_greatest(rows, logits_NV)
        if self._temperature != 1:
            if below_N is not None:
                self._add_tokens(rows, below_N, logits_NV.softmax(-1))
                below_N = None
            logits_NV /= self._temperature
        if self._map_V is None:
            log_probs_NV = logits_NV.log_softmax(-1)
            if below_N is not None:
                self._add_tokens(rows, below_N, log_probs_NV.exp())
            return log_probs_NV
        probs_NV = logits_NV.softmax(-1)
        if below_N is not None:
            self._add_tokens(rows, below_N, probs_NV)
        self._probs_NV = probs_NV if self.learns else None
        folded_NC = probs_NV.new_zeros(len(probs_NV), self._num_classes).index_add_(1, self._map_V, probs_NV)
        # The floor keeps an underflowed class finite; its ids' probabilities are zero, so their gradients stay exact.
        return folded_NC.clamp_(min=torch.finfo(self.dtype).tiny).log_()

    def only_tokens(self, rows: slice | Tensor) -> None:
        """Add a chunk's cross-entropy and its gradients; nothing is folded."""
        logits_NV = self._logits(rows)
        below_N = self._below_greatest(rows, logits_NV)
        assert below_N is not None
        self._add_tokens(rows, below_N, logits_NV.softmax(-1))
        if self.learns:
            self.accumulate(rows, None, None, None)

    def _logits(self, rows: slice | Tensor) -> Tensor:
        logits_NV = (self._hidden_SD[rows] @ self._weight_VD.T).to(self.dtype)
        if self._bias_V is not None:
            logits_NV += self._bias_V
        if self._head.logit_scale != 1:
            logits_NV *= self._head.logit_scale
        if self._head.soft_cap is not None:
            logits_NV = logits_NV.div_(self._head.soft_cap).tanh_()
            self._tanh_NV = logits_NV.clone() if self.learns else None
            logits_NV *= self._head.soft_cap
        return logits_NV

    def _below_greatest(self, rows: slice | Tensor, logits_NV: Tensor) -> Tensor | None:
        """By how much each target's logit is below its row's greatest; None without targets."""
        if self._target_S is None:
            return None
        target_N1 = self._target_S[rows, None].clamp(min=0)
        return logits_NV.amax(-1) - logits_NV.gather(1, target_N1).squeeze(1)

    def _add_tokens(self, rows: slice | Tensor, below_N: Tensor, probs_NV: Tensor) -> None:
        """Add a chunk's cross-entropy. The greatest probability never underflows, so its logarithm is exact."""
        assert self._target_S is not None
        losses_N = below_N - probs_NV.amax(-1).log_()
        self._token_value += (losses_N * (self._target_S[rows] >= 0)).sum()
        self._token_probs_NV = probs_NV if self.learns else None

    def add_loss(self, values_N: Tensor, weights_N: Tensor | None) -> None:
        """Add a chunk's losses, not yet scaled."""
        self._value += (values_N if weights_N is None else values_N * weights_N).sum()

    def accumulate(
        self, rows: slice | Tensor, slope_NC: Tensor | None, log_probs_NC: Tensor | None, weights_N: Tensor | None
    ) -> None:
        """Add a chunk's gradients, those of its cross-entropy among them; overwrites `slope_NC`.

        Args:
            rows: the chunk of the latest `class_log_probs`.
            slope_NC: gradient of each row's loss with respect to unnormalised class log-probabilities. Each class's
                share is split among its ids by their probabilities. None where only tokens are learnt.
            log_probs_NC: what `class_log_probs` returned; needed with `slope_NC`.
            weights_N: weight of each row's loss over classes.
        """
        slope_NV: Tensor | None = None
        if slope_NC is not None:
            factor = self.scale * self._head.logit_scale / self._temperature
            slope_NC *= factor if weights_N is None else (factor * weights_N)[:, None]
            slope_NV = self._unfold(slope_NC, log_probs_NC)
        if self._target_S is not None:
            slope_NV = self._with_tokens(rows, slope_NV)
        assert slope_NV is not None
        if self._tanh_NV is not None:
            slope_NV *= 1 - self._tanh_NV.square_()
        self._pull_back(rows, slope_NV)

    def _with_tokens(self, rows: slice | Tensor, slope_NV: Tensor | None) -> Tensor:
        """Add the cross-entropy's slope, `p - 1[target]`."""
        assert self._target_S is not None
        assert self._token_probs_NV is not None
        target_N1 = self._target_S[rows, None]
        factor_N1 = (target_N1 >= 0).to(self.dtype) * (self._token_scale * self._head.logit_scale)
        if slope_NV is None:
            slope_NV = self._token_probs_NV.mul_(factor_N1)
        else:
            slope_NV.addcmul_(self._token_probs_NV, factor_N1)
        return slope_NV.scatter_add_(1, target_N1.clamp(min=0), -factor_N1)

    def _pull_back(self, rows: slice | Tensor, slope_NV: Tensor) -> None:
        """Through the head, to its inputs."""
        grad_hidden_SD, grad_weight_VD, grad_bias_V = self._gradients
        if grad_bias_V is not None:
            grad_bias_V[: self._head.num_tokens] += slope_NV.sum(0)
        slope_NV = slope_NV.to(self._hidden_SD.dtype)
        if grad_hidden_SD is not None:
            grad_hidden_SD[rows] = (slope_NV @ self._weight_VD).to(grad_hidden_SD.dtype)
        if grad_weight_VD is not None:
            known_VD = grad_weight_VD[: self._head.num_tokens]
            if known_VD.dtype == slope_NV.dtype:
                known_VD.addmm_(slope_NV.T, self._hidden_SD[rows])
            else:
                known_VD += slope_NV.T @ self._hidden_SD[rows]

    def _unfold(self, slope_NC: Tensor, log_probs_NC: Tensor | None) -> Tensor:
        """Each class's slope shared among its ids: times `q_u / q~_c(u)`."""
        if self._map_V is None:
            return slope_NC
        assert self._probs_NV is not None
        assert log_probs_NC is not None
        slope_NC *= torch.exp(-log_probs_NC)
        return slope_NC.index_select(1, self._map_V).mul_(self._probs_NV)

    def sums(self) -> tuple[Tensor, Tensor]:
        """The sums so far, without scale or gradient: over classes, and of the cross-entropy."""
        return self._value, self._token_value

    def loss(self) -> Tensor:
        """The scaled loss, cross-entropy included, 0-dim, tied to this side's tensors only."""
        value = self._value * self.scale + self._token_value * self._token_scale
        if not self.learns:
            return value
        loss: Tensor = _Attached.apply(value, self._gradients, *self._inputs)  # type: ignore[no-untyped-call]
        return loss


def _wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


class _Attached(torch.autograd.Function):
    """A value whose gradients are known already; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.repeatable = value.dtype == torch.float64
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss keeps its gradients for one backward pass; compute it again for another")
        if ctx.repeatable:  # float64 is for checks, and `gradcheck` runs the pass many times
            return (None, None, *(None if gradient is None else gradient * grad for gradient in ctx.gradients))
        scaled = [  # in place: a copy of the head's gradient could be the largest tensor of the step
            None if gradient is None else gradient.mul_(grad).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return (None, None, *scaled)
