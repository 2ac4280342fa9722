"""One vector a row: a model's last hidden states, averaged over the response; and maps between models' vectors.

Names: N rows of the probe set, B rows of a batch, T tokens, D a model's hidden size, E dimensions of the common space.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cotuning.cross_entropy import response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import EncodedBatch
from cotuning.language_model import LanguageModel, hidden_states
from cotuning.training import Precision, Step, autocast, micro_batches
from cotuning.tuning import StepAt

Distance = Literal["cosine", "mse"]

_ROWS_AT_ONCE = 32


class FeaturesRefused(ValueError):
    """Features that were not asked for so, or are no numbers."""


@dataclass(frozen=True)
class DeviceFeatures:
    """What the server takes of one device.

    Attributes:
        features_NE: float32, from `check_features`.
        num_examples: weight.
    """

    features_NE: Tensor
    num_examples: int


@dataclass(frozen=True)
class View:
    """A model's way into the common space: `(h - centre) W`.

    Attributes:
        centre_D: taken from every pooled state.
        map_DE: W.
    """

    centre_D: Tensor
    map_DE: Tensor

    def project(self, pooled_BD: Tensor) -> Tensor:
        """Features [B, E] of pooled states, with gradients to these."""
        return (pooled_BD - self.centre_D) @ self.map_DE

    def to_send(self, pooled_ND: Tensor) -> Tensor:
        """Features [N, E] as they travel: float16, values beyond its range at its ends."""
        most = torch.finfo(torch.float16).max
        return self.project(pooled_ND.float()).clamp(-most, most).half()

    def to(self, device: torch.device) -> "View":
        """The same constants on `device`."""
        return View(self.centre_D.detach().to(device), self.map_DE.detach().to(device))


def pool(hidden_BTD: Tensor, batch: EncodedBatch) -> Tensor:
    """The mean of each row's hidden states over the positions that predict its response's tokens, END's among them.

    Returns:
        [B, D], float32 (float64 if the states are).

    Raises:
        ValueError: a row has no response token.
    """
    tokens = response_tokens(batch)
    counts_B = torch.bincount(tokens.sample_N, minlength=len(batch.input_ids_BT))
    for row in (counts_B == 0).nonzero().flatten().tolist()[:1]:
        raise ValueError(f"expected a response in every row, row {row} has no token of one")
    kind = torch.promote_types(hidden_BTD.dtype, torch.float32)
    sums_BD = torch.zeros(len(counts_B), hidden_BTD.shape[-1], dtype=kind, device=hidden_BTD.device)
    sums_BD = sums_BD.index_add(0, tokens.sample_N, hidden_BTD[tokens.sample_N, tokens.position_N].to(kind))
    return sums_BD / counts_B[:, None]


@torch.no_grad()
def pooled_rows(lm: LanguageModel, rows: EncodedRows) -> Tensor:
    """The pooled states of all rows, as the model stands: [N, D] on the CPU.

    Raises:
        ValueError: no rows, or one without a response token.
    """
    total = len(rows.examples)
    if not total:
        raise ValueError("expected at least one probe row, got none")
    parts: list[Tensor] = []
    for start in range(0, total, _ROWS_AT_ONCE):
        batch = rows.batch(range(start, min(start + _ROWS_AT_ONCE, total)))
        parts.append(pool(hidden_states(lm, batch.input_ids_BT), batch).cpu())
    return torch.cat(parts)


def fit_map(features_ND: Tensor, target_NE: Tensor, *, ridge: float) -> Tensor:
    """The linear map W [D, E] of least `|X W - F|^2 + ridge s |W|^2`, s the mean of X's squared singular values.

    Ridge regression (Hoerl and Kennard, 1970) in closed form, float64: a map learnt to its end, of which nothing is
    random and which needs no steps.

    Args:
        features_ND: X.
        target_NE: F.
        ridge: above 0.

    Raises:
        ValueError: unlike numbers of rows, or no ridge.
    """
    if len(features_ND) != len(target_NE) or ridge <= 0:
        raise ValueError(
            f"expected as many rows on both sides and a ridge above 0, got {len(features_ND)} and {len(target_NE)} "
            f"rows, ridge {ridge}"
        )
    x_ND, f_NE = features_ND.double(), target_NE.double()
    gram_DD = x_ND.T @ x_ND
    scale = float(gram_DD.diagonal().mean())
    added_DD = torch.eye(len(gram_DD), dtype=torch.float64) * max(ridge * scale, torch.finfo(torch.float64).tiny)
    solved_DE: Tensor = torch.linalg.solve(gram_DD + added_DD, x_ND.T @ f_NE)
    return solved_DE.float()


def distances(found_BE: Tensor, target_BE: Tensor, distance: Distance, *, size: float) -> Tensor:
    """How far each row is from its target: [B]; no gradient reaches the target.

    Args:
        found_BE: of the student.
        target_BE: of the teacher.
        distance: `cosine`: `1 - cos`, in 0..2; `mse`: the squared error over `size`.
        size: mean squared norm of the whole probe set's targets.

    Raises:
        ValueError: another distance.
    """
    target_BE = target_BE.detach()
    if distance == "cosine":
        return 1 - cosine_similarity(found_BE, target_BE, dim=1)
    if distance != "mse":
        raise ValueError(f"expected a distance of cosine or mse, got {distance!r}")
    return (found_BE - target_BE).square().sum(1) / max(size, torch.finfo(torch.float32).tiny)


def feature_steps(
    lm: LanguageModel,
    name: str,
    rows: EncodedRows,
    batches: Sequence[Sequence[int]],
    *,
    view: View,
    target_NE: Tensor,
    distance: Distance,
    weight: float,
    precision: Precision = "float32",
    micro_batch_size: int | None = None,
) -> StepAt:
    """Each step's `weight * mean over rows of distance((pooled - centre) W, target)`, as the learner's objective.

    Args:
        lm: the student, with its adapter on.
        name: of the adapter.
        rows: the probe set as the student reads it.
        batches: indices of the probe rows of each step.
        view: a constant.
        target_NE: of each probe row.
        distance: see `distances`.
        weight: of the mean in the objective.
        precision: of the forward pass.
        micro_batch_size: rows in memory at a time, all if not given.
    """
    rows.encode(index for batch in batches for index in batch)
    device = lm.device
    view, target_NE = view.to(device), target_NE.detach().to(device)
    size = float(target_NE.double().square().sum(1).mean())

    def step_at(step: int) -> Iterator[Step]:
        indices = batches[step]
        for part in micro_batches(indices, micro_batch_size):
            batch = rows.batch(part)
            with autocast(lm, precision):
                hidden_BTD = hidden_states(lm, batch.input_ids_BT)
            target_BE = target_NE[torch.tensor(part, device=device)]
            found_BE = view.project(pool(hidden_BTD, batch))
            loss = distances(found_BE, target_BE, distance, size=size).sum() / len(indices)
            yield Step({name: weight * loss}, {"feature": loss.detach()})

    return step_at


def check_features(features: Tensor, *, num_rows: int, feature_size: int) -> Tensor:
    """What a party sent, as float32.

    Raises:
        FeaturesRefused: another shape or type, or a value that is not finite.
    """
    if features.dtype != torch.float16 or features.shape != (num_rows, feature_size):
        raise FeaturesRefused(
            f"expected features as float16 [{num_rows}, {feature_size}], got {features.dtype} {list(features.shape)}"
        )
    for row in (~features.isfinite()).any(1).nonzero().flatten().tolist()[:1]:
        raise FeaturesRefused(f"expected finite features, row {row} has one that is not")
    return features.float()


def mean_features(device_features: Sequence[DeviceFeatures], *, max_examples: int) -> Tensor:
    """A: the mean of the devices' features, weighted by their examples; float32 [N, E], summed in float64.

    Args:
        device_features: at least one.
        max_examples: a device weighs at most so many.

    Raises:
        ValueError: none, or one without examples.
    """
    weights = [min(each.num_examples, max_examples) for each in device_features]
    if not weights or min(weights) <= 0:
        raise ValueError(f"expected features of devices with at least one example each, got weights {weights}")
    total = sum(weights)
    parts = [each.features_NE.double() * weight for each, weight in zip(device_features, weights, strict=True)]
    return (torch.stack(parts).sum(0) / total).float()
