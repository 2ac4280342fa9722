"""The one training loop, and the order in which rows are drawn.

Everything random here is a pure function of a seed: the same inputs give the same bits on the same machine. The loop
knows nothing of models: it is given, for every step, an objective for each learner, whole or in parts that add up to it
(gradient accumulation). Given `Checkpoints`, it goes on from the last one, with the bits of a training that was never
interrupted.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cotuning.checkpoints import Checkpoints, TrainingState, capture, fingerprint, restore
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.schedules import ScheduleName, share_of_rate
from cotuning.seeding import derive_seed

OnProgress = Callable[[str, int, int, dict[str, float]], None]
"""Called after every step with stage, steps done, steps in all, and that step's losses. What it raises ends the
training there, with models as they were lent and nothing half-written."""

Precision = Literal["float32", "bfloat16"]
DEFAULT_BETAS = (0.9, 0.999)
"""AdamW's own."""
_POOL_BATCHES = 8
_REPORTED_SHARE = 0.1


class TrainingDiverged(ValueError):
    """A loss or gradient is not a number any more; the message names stage, step and loss."""


@dataclass(frozen=True)
class Learner:
    """What one optimizer moves.

    Attributes:
        parameters: tensors that require gradients.
        learning_rate: after warm-up.
        weight_decay: AdamW's.
        betas: AdamW's.
        gradient_clip: greatest L2 norm of all gradients together.
    """

    parameters: Sequence[Tensor]
    learning_rate: float
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    betas: tuple[float, float] = DEFAULT_BETAS


@dataclass(frozen=True)
class Step:
    """What a step, or one micro-batch of it, computes: an objective (0-dim, with gradient) by learner, and numbers to
    report. Both of a step are the sums of its micro-batches'."""

    objectives: Mapping[str, Tensor]
    report: Mapping[str, Tensor]


@dataclass
class _Report:
    """Losses of the last tenth of the steps."""

    first_step: int
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: int, losses: Mapping[str, float]) -> None:
        if step >= self.first_step:
            for name, value in losses.items():
                self.values.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.values.items()}


def train(
    learners: Mapping[str, Learner],
    step_at: Callable[[int], Iterable[Step]],
    *,
    steps: int,
    stage: str,
    on_progress: OnProgress,
    schedule: ScheduleName = "constant",
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Take `steps` AdamW steps for every learner.

    The warm-up is taken every time, because the optimizers start without moments every time.

    Args:
        step_at: the micro-batches of a step, or the whole of it as the only one. Each is asked for when the backward
            passes of the one before are done, so only one is held at a time. Their means must be over the whole step:
            a mean of the micro-batches' means would weigh a token by how many others its micro-batch has.
        schedule: of the learning rates. One that falls towards none is for training that is not continued: without it
            the last steps of a model whose weights all learn undo much of what it had.
        checkpoints: where the state is kept; a stage that has a state there goes on from it. Everything else must be
            as it was in the interrupted training: frozen weights, rows, and `step_at` a function of the step alone.
            torch's global generators are then set too, so call this inside `seeding.isolated_generators`.

    Returns:
        Mean of each reported number over the last tenth of the steps (at least one).

    Raises:
        TrainingDiverged: an objective or a gradient is not finite; the parameters keep their last finite values.
        Exception: whatever `on_progress` raises.
    """
    optimizers = {
        name: torch.optim.AdamW(
            learner.parameters,
            lr=learner.learning_rate,
            betas=learner.betas,
            weight_decay=learner.weight_decay,
            fused=True,
        )
        for name, learner in learners.items()
    }
    report = _Report(first_step=steps - max(1, round(steps * _REPORTED_SHARE)))
    keeper = None
    if checkpoints:
        keeper = _Keeper(checkpoints, learners, optimizers, stage=stage, steps=steps, schedule=schedule)
    for step in range(keeper.resume(report) if keeper else 0, steps):
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        objectives, losses = _accumulate(step_at(step))
        for name, learner in learners.items():
            rate = learner.learning_rate * share_of_rate(schedule, step, steps)
            try:
                _move(learner, optimizers[name], objectives[name], rate)
            except TrainingDiverged as error:
                expected = f"expected a finite loss and gradient for {name}"
                raise TrainingDiverged(f"{stage}, step {step + 1} of {steps}: {expected}, {error}") from None
        report.add(step, losses)
        if keeper:
            keeper.keep(step + 1, report)
        on_progress(stage, step + 1, steps, losses)
    return report.means()


def _accumulate(parts: Iterable[Step]) -> tuple[dict[str, float], dict[str, float]]:
    """Add every part's gradients to the parameters'; return the sums of the objectives and of the reported numbers."""
    objectives: dict[str, float] = {}
    losses: dict[str, float] = {}
    for part in parts:
        for name, value in part.report.items():
            losses[name] = losses.get(name, 0.0) + float(value)
        for name, objective in part.objectives.items():
            objective.backward()  # type: ignore[no-untyped-call]
            objectives[name] = objectives.get(name, 0.0) + float(objective.detach())
    return objectives, losses


def _move(learner: Learner, optimizer: torch.optim.Optimizer, loss: float, rate: float) -> None:
    """One AdamW step; `TrainingDiverged` before anything moved if the loss or a gradient is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    norm = float(torch.nn.utils.clip_grad_norm_(learner.parameters, learner.gradient_clip))
    if not (math.isfinite(norm) and math.isfinite(loss)):
        raise TrainingDiverged(f"got loss {loss} and gradient norm {norm}")
    optimizer.step()


class _Keeper:
    """Reads and writes one stage's checkpoints; made before the first step, whose parameters are in the fingerprint."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        learners: Mapping[str, Learner],
        optimizers: Mapping[str, torch.optim.Optimizer],
        *,
        stage: str,
        steps: int,
        schedule: ScheduleName,
    ) -> None:
        rates = {name: [each.learning_rate, each.gradient_clip] for name, each in learners.items()}
        settings = {"stage": stage, "steps": steps, "schedule": schedule, "learners": rates}
        self._checkpoints, self._stage, self._steps, self._optimizers = checkpoints, stage, steps, optimizers
        self._fingerprint = fingerprint(settings, optimizers)

    def resume(self, report: _Report) -> int:
        """Put back the kept state, if there is one; return the step to go on from."""
        state = self._checkpoints.read(self._stage, self._fingerprint)
        if state is None:
            return 0
        restore(self._optimizers, state.tensors)
        report.values = {name: list(values) for name, values in state.reported.items()}
        return state.step

    def keep(self, step: int, report: _Report) -> None:
        """Keep the state if it is due."""
        if self._checkpoints.due(step, self._steps):
            state = TrainingState(step, capture(self._optimizers), report.values)
            self._checkpoints.write(self._stage, self._fingerprint, state)


def draw_batches(sizes: Sequence[int], *, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Which rows each step reads: `steps` lists of `batch_size` indices.

    Every row is drawn once before any is drawn again. Rows of like size come together, which saves padding: a pool of
    eight batches is cut in order of size, and its batches are shuffled.

    Args:
        sizes: of each row, any unit; characters do for every tokenizer.
        batch_size: rows a step.
        steps: lists to return.
        seed: the only randomness.

    Raises:
        ValueError: no rows.
    """
    if not sizes:
        raise ValueError("expected at least one row to train on, got none")
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    while len(stream) < steps * batch_size:
        stream.extend(torch.randperm(len(sizes), generator=generator).tolist())
    batches: list[list[int]] = []
    for start in range(0, steps * batch_size, _POOL_BATCHES * batch_size):
        stop = min(start + _POOL_BATCHES * batch_size, steps * batch_size)
        pool = sorted(stream[start:stop], key=lambda index: (sizes[index], index))
        cut = [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
        batches.extend(cut[place] for place in torch.randperm(len(cut), generator=generator).tolist())
    return batches


def draw_mixed_batches(
    first: Sequence[int], second: Sequence[int], *, batch_size: int, from_second: int, steps: int, seed: int
) -> list[list[int]]:
    """Batches of two pools of rows, given by their sizes; indices of the second pool follow those of the first.

    Args:
        first: as `sizes` of `draw_batches`.
        second: likewise.
        batch_size: rows a batch.
        from_second: of them from the second pool.
        steps: batches.
        seed: equal seeds give equal batches.
    """
    batches = draw_batches(first, batch_size=batch_size - from_second, steps=steps, seed=seed)
    if not from_second:
        return batches
    others = draw_batches(second, batch_size=from_second, steps=steps, seed=derive_seed(seed, "second"))
    return [[*batch, *(index + len(first) for index in other)] for batch, other in zip(batches, others, strict=True)]


def micro_batches(batch: Sequence[int], size: int | None) -> list[Sequence[int]]:
    """A batch cut into parts of `size` rows, the last one of what is left; None cuts nothing."""
    return [batch] if size is None else [batch[start : start + size] for start in range(0, len(batch), size)]


def row_sizes(examples: Sequence[Example]) -> list[int]:
    """Characters of each row."""
    return [len(row.instruction) + len(row.input) + len(row.output) for row in examples]


@contextmanager
def training_mode(lm: LanguageModel) -> Iterator[None]:
    """Inside, the adapters' own dropout acts and nothing else does.

    The base is frozen, so its dropout would be noise without a purpose; and in mutual learning every forward pass is
    also a teacher's.
    """
    dropouts = [module for name, module in lm.model.named_modules() if ".lora_dropout." in name]
    lm.model.eval()
    for module in dropouts:
        module.train()
    try:
        yield
    finally:
        lm.model.eval()


def autocast(lm: LanguageModel, precision: Precision) -> torch.autocast:
    """The forward pass in bfloat16, or as the model is."""
    return torch.autocast(lm.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
