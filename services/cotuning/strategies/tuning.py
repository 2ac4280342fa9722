"""What strategies have in common: a device tunes psi_i on its rows, the server omega on public ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from cotuning.adapters import activate, adapted, lora_config
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.seeding import derive_seed
from cotuning.strategies.interface import DeviceInputs, ServerInputs
from cotuning.training import DEFAULT_BETAS, draw_batches, draw_mixed_batches, row_sizes
from cotuning.tuning import AdapterTraining, StepAt, cross_entropy_steps, train_adapter
from protocol.strategies import LocalTraining, LoraSettings, ServerSteps

DROPOUT = "dropout"
"""An SLM's training on its rows draws for this, whatever its stage is called: so strategies can be compared."""


def tune_locally(
    lm: LanguageModel,
    given: DeviceInputs,
    training: LocalTraining,
    *,
    stage: str,
    added: Sequence[Example] = (),
    added_share: float = 0.0,
    betas: tuple[float, float] = DEFAULT_BETAS,
) -> dict[str, float]:
    """One round's steps on the private rows.

    Args:
        lm: the device's, with the adapter `slm` on, which alone learns.
        given: of the round.
        training: of the strategy.
        stage: under which it is reported and checkpointed.
        added, added_share: see `local_steps`.
        betas: AdamW's.

    Returns:
        `slm_ce`, nats a token, mean of the last tenth of the steps.
    """
    options = adapter_training(training, given, stage=stage, drawn_for=DROPOUT, betas=betas)
    step_at = local_steps(lm, given, training, added=added, added_share=added_share)
    losses = train_adapter(lm, "slm", step_at, steps=training.steps, **options)
    return {"slm_ce": losses["cross_entropy"]}


def local_steps(
    lm: LanguageModel,
    given: DeviceInputs,
    training: LocalTraining,
    *,
    added: Sequence[Example] = (),
    added_share: float = 0.0,
) -> StepAt:
    """The objective of those steps: cross-entropy on rows in an order that seed and round alone decide.

    Args:
        lm, given, training: as for `tune_locally`.
        added: other rows, of which each batch holds a share; without any, or a share that makes no row of a batch, it
            is as if there were none, bit for bit.
        added_share: rounded to whole rows, at least one of a batch stays private.
    """
    from_added = min(round(training.batch_size * added_share), training.batch_size - 1) if added else 0
    batches = draw_mixed_batches(
        row_sizes(given.private),
        row_sizes(added),
        batch_size=training.batch_size,
        from_second=from_added,
        steps=training.steps,
        seed=derive_seed(given.seed, "rows", given.round_number),
    )
    return cross_entropy_steps(
        lm,
        "slm",
        EncodedRows(lm, [*given.private, *added], max_length=training.max_length),
        batches,
        precision=training.precision,
        micro_batch_size=training.micro_batch_size,
        label_smoothing=training.label_smoothing,
    )


def public_steps(llm: LanguageModel, given: ServerInputs, server: ServerSteps) -> StepAt:
    """The server's objective for the adapter `llm`: cross-entropy on public rows."""
    batches = draw_batches(
        row_sizes(given.public),
        batch_size=server.batch_size,
        steps=server.steps,
        seed=derive_seed(given.seed, "public_rows", given.round_number),
    )
    return cross_entropy_steps(
        llm,
        "llm",
        EncodedRows(llm, given.public, max_length=server.max_length),
        batches,
        precision=server.precision,
        micro_batch_size=server.micro_batch_size,
    )


def adapter_training(
    how: LocalTraining | ServerSteps,
    given: DeviceInputs | ServerInputs,
    *,
    stage: str,
    drawn_for: str | None = None,
    learning_rate: float | None = None,
    betas: tuple[float, float] = DEFAULT_BETAS,
) -> AdapterTraining:
    """The arguments of `tuning.train_adapter`, on a device or on the server.

    Args:
        how: of the strategy; weights decay on devices alone.
        given: of the round.
        stage: under which it is reported and checkpointed.
        drawn_for: names the draws of dropout among those of the round, as the stage does by default.
        learning_rate: of the adapter that learns, in place of that of `how`.
        betas: AdamW's.
    """
    if isinstance(how, LocalTraining):
        own_rate, weight_decay = how.learning_rate, how.weight_decay
    else:
        own_rate, weight_decay = how.llm_learning_rate, 0.0
    return AdapterTraining(
        learning_rate=own_rate if learning_rate is None else learning_rate,
        weight_decay=weight_decay,
        gradient_clip=how.gradient_clip,
        gradient_checkpointing=how.gradient_checkpointing,
        betas=betas,
        seed=derive_seed(given.seed, drawn_for or stage, given.round_number),
        stage=stage,
        on_progress=given.on_progress,
        checkpoints=given.checkpoints,
    )


@contextmanager
def with_adapter(
    lm: LanguageModel, name: str, state: Mapping[str, Tensor] | None, lora: LoraSettings, *, seed: int
) -> Iterator[LanguageModel]:
    """Lend the model with one adapter on, which alone learns.

    Args:
        lm: without adapters; given back so.
        name: `slm` (psi_i) or `llm` (omega).
        state: after the last round, None in the first: then a fresh one.
        lora: its settings.
        seed: the run's.

    Raises:
        AdapterMismatch: the state is not of this model and these settings.
    """
    config = lora_config(lm, **lora.model_dump())
    start = derive_seed(seed, f"{name}_adapter") if state is None else state
    with adapted(lm, config, {name: start}) as lent:
        activate(lent, [name], trainable=[name])
        yield lent
