"""Training one adapter of one model: by cross-entropy on responses, or by an objective that is given."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict, Unpack

from cotuning.adapters import adapter_parameters
from cotuning.checkpoints import Checkpoints
from cotuning.cross_entropy import ResponseTokens, cross_entropy, response_tokens
from cotuning.encoded_rows import EncodedRows
from cotuning.encoding import EncodedBatch
from cotuning.gradient_checkpointing import recomputed_layers
from cotuning.language_model import LanguageModel, hidden_states, output_head
from cotuning.seeding import derive_seed, isolated_generators
from cotuning.training import (
    DEFAULT_BETAS,
    Learner,
    OnProgress,
    Precision,
    Step,
    autocast,
    micro_batches,
    train,
    training_mode,
)

StepAt = Callable[[int], Iterator[Step]]
"""The micro-batches of a step; see `training.train`."""


class _Required(TypedDict):
    learning_rate: float
    seed: int
    stage: str
    on_progress: OnProgress


class AdapterTraining(_Required, total=False):
    """The arguments that every training of an adapter takes; see `train_adapter`."""

    weight_decay: float
    gradient_clip: float
    betas: tuple[float, float]
    gradient_checkpointing: bool
    checkpoints: Checkpoints | None


def cross_entropy_steps(
    lm: LanguageModel,
    name: str,
    rows: EncodedRows,
    batches: Sequence[Sequence[int]],
    *,
    precision: Precision = "float32",
    micro_batch_size: int | None = None,
    label_smoothing: float = 0.0,
) -> StepAt:
    """Each step's cross-entropy on responses, mean per token, as the objective of the learner `name`.

    `label_smoothing`: see `cross_entropy`; what is reported is then smoothed too.
    """
    rows.encode(index for batch in batches for index in batch)
    head = output_head(lm)

    def learn(batch: EncodedBatch, tokens: ResponseTokens, num_tokens: int) -> Step:
        with autocast(lm, precision):
            hidden_BTD = hidden_states(lm, batch.input_ids_BT)
            hidden_ND = hidden_BTD[tokens.sample_N, tokens.position_N]
            loss, _ = cross_entropy(
                hidden_ND, head, tokens.target_N, num_tokens=num_tokens, label_smoothing=label_smoothing
            )
        return Step({name: loss}, {"cross_entropy": loss.detach()})

    def step_at(step: int) -> Iterator[Step]:
        parts = [rows.batch(part) for part in micro_batches(batches[step], micro_batch_size)]
        tokens = [response_tokens(part) for part in parts]
        num_tokens = sum(len(each.target_N) for each in tokens)
        for part, tokens_N in zip(parts, tokens, strict=True):
            yield learn(part, tokens_N, num_tokens)

    return step_at


def train_adapter(
    lm: LanguageModel,
    name: str,
    step_at: StepAt,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    gradient_clip: float = 1.0,
    betas: tuple[float, float] = DEFAULT_BETAS,
    gradient_checkpointing: bool = False,
    seed: int,
    stage: str,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Train one adapter by the objective that `step_at` forms; everything else is frozen. Changes it in place.

    Args:
        lm: with the adapter on, and activated so that it alone learns (`adapters.activate`).
        name: of the adapter, and of the learner in each `Step`.
        step_at: see `training.train`.
        steps: how many; 0 is nothing.
        betas: AdamW's.
        gradient_checkpointing: see there.
        seed: of dropout.
        checkpoints: see `training.train`.

    Returns:
        As `training.train`; empty for no steps.
    """
    if not steps:
        return {}
    parameters = list(adapter_parameters(lm, name).values())
    with (
        isolated_generators(derive_seed(seed, "dropout"), lm.device),
        training_mode(lm),
        recomputed_layers(lm, enabled=gradient_checkpointing),
    ):
        learner = Learner(parameters, learning_rate, weight_decay, gradient_clip, betas)
        return train(
            {name: learner}, step_at, steps=steps, stage=stage, on_progress=on_progress, checkpoints=checkpoints
        )


def tune_adapter(
    lm: LanguageModel,
    name: str,
    rows: EncodedRows,
    batches: Sequence[Sequence[int]],
    *,
    precision: Precision = "float32",
    micro_batch_size: int | None = None,
    **options: Unpack[AdapterTraining],
) -> dict[str, float]:
    """Train one adapter by cross-entropy on responses. Changes it in place.

    Args:
        lm: as for `train_adapter`.
        name: of the adapter.
        rows: to learn, as `lm` reads them.
        batches: indices of the rows of each step, for example from `draw_batches`.
        micro_batch_size: rows of a step in memory at a time, all if not given. Without dropout it changes nothing but
            rounding.
        options: as for `train_adapter`.

    Returns:
        `{"cross_entropy": mean of the last tenth of the steps}`, nats a token; empty for no steps.
    """
    step_at = cross_entropy_steps(lm, name, rows, batches, precision=precision, micro_batch_size=micro_batch_size)
    return train_adapter(lm, name, step_at, steps=len(batches), **options)
