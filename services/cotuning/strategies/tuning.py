"""What strategies have in common: a device tunes psi_i on its rows, the server omega on public ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from cotuning.adapters import activate, adapted, lora_config
from cotuning.checkpoints import Checkpoints
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.seeding import derive_seed
from cotuning.training import DEFAULT_BETAS, OnProgress, draw_batches, draw_mixed_batches, row_sizes
from cotuning.tuning import AdapterTraining, StepAt, cross_entropy_steps, train_adapter
from protocol.strategies import LocalTraining, LoraSettings, ServerSteps


def tune_locally(
    lm: LanguageModel,
    private: Sequence[Example],
    training: LocalTraining,
    *,
    added: Sequence[Example] = (),
    added_share: float = 0.0,
    round_number: int,
    seed: int,
    stage: str,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
    betas: tuple[float, float] = DEFAULT_BETAS,
) -> dict[str, float]:
    """One round's steps on the private rows.

    Args:
        lm: with the adapter `slm` on, which alone learns.
        private: D_i.
        training: of the strategy.
        added, added_share: see `local_steps`.
        round_number: from 1.
        seed: the run's.
        stage: under which it is reported and checkpointed.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`.
        betas: AdamW's.

    Returns:
        `slm_ce`, nats a token, mean of the last tenth of the steps.
    """
    options = adapter_training(
        training,
        seed=derive_seed(seed, "dropout", round_number),
        stage=stage,
        on_progress=on_progress,
        checkpoints=checkpoints,
        betas=betas,
    )
    step_at = local_steps(
        lm, private, training, added=added, added_share=added_share, round_number=round_number, seed=seed
    )
    losses = train_adapter(lm, "slm", step_at, steps=training.steps, **options)
    return {"slm_ce": losses["cross_entropy"]}


def local_steps(
    lm: LanguageModel,
    private: Sequence[Example],
    training: LocalTraining,
    *,
    added: Sequence[Example] = (),
    added_share: float = 0.0,
    round_number: int,
    seed: int,
) -> StepAt:
    """The objective of those steps: cross-entropy on rows in an order that seed and round alone decide.

    Args:
        lm, private, training, round_number, seed: as for `tune_locally`.
        added: other rows, of which each batch holds a share; without any, or a share that makes no row of a batch, it
            is as if there were none, bit for bit.
        added_share: rounded to whole rows, at least one of a batch stays private.
    """
    from_added = min(round(training.batch_size * added_share), training.batch_size - 1) if added else 0
    batches = draw_mixed_batches(
        row_sizes(private),
        row_sizes(added),
        batch_size=training.batch_size,
        from_second=from_added,
        steps=training.steps,
        seed=derive_seed(seed, "rows", round_number),
    )
    return cross_entropy_steps(
        lm,
        "slm",
        EncodedRows(lm, [*private, *added], max_length=training.max_length),
        batches,
        precision=training.precision,
        micro_batch_size=training.micro_batch_size,
    )


def adapter_training(
    training: LocalTraining,
    *,
    seed: int,
    stage: str,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None,
    betas: tuple[float, float] = DEFAULT_BETAS,
) -> AdapterTraining:
    """The arguments of `tuning.train_adapter` that a device's settings give."""
    return AdapterTraining(
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        gradient_clip=training.gradient_clip,
        gradient_checkpointing=training.gradient_checkpointing,
        betas=betas,
        seed=seed,
        stage=stage,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )


def server_training(
    server: ServerSteps,
    *,
    seed: int,
    stage: str,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None,
    betas: tuple[float, float] = DEFAULT_BETAS,
) -> AdapterTraining:
    """The same of the LLM's adapter on the server."""
    return AdapterTraining(
        learning_rate=server.llm_learning_rate,
        gradient_clip=server.gradient_clip,
        gradient_checkpointing=server.gradient_checkpointing,
        betas=betas,
        seed=seed,
        stage=stage,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )


def public_steps(
    llm: LanguageModel, public: Sequence[Example], server: ServerSteps, *, round_number: int, seed: int
) -> StepAt:
    """The server's objective for the adapter `llm`: cross-entropy on public rows."""
    batches = draw_batches(
        row_sizes(public),
        batch_size=server.batch_size,
        steps=server.steps,
        seed=derive_seed(seed, "public_rows", round_number),
    )
    return cross_entropy_steps(
        llm,
        "llm",
        EncodedRows(llm, public, max_length=server.max_length),
        batches,
        precision=server.precision,
        micro_batch_size=server.micro_batch_size,
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
