"""A device by itself: one adapter of the SLM learns the private rows by cross-entropy, for one round."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cotuning.adapters import AdapterState, activate, adapted, adapter_state, lora_config
from cotuning.checkpoints import Checkpoints
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.seeding import derive_seed
from cotuning.training import OnProgress, draw_batches, row_sizes, tune_adapter
from protocol.strategies import LocalTraining, LoraSettings


def tune_on_private_rows(
    *,
    slm: LanguageModel,
    private: Sequence[Example],
    start: Mapping[str, Tensor] | None,
    lora: LoraSettings,
    training: LocalTraining,
    round_number: int,
    seed: int,
    stage: str,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None,
) -> tuple[AdapterState, dict[str, float]]:
    """Train the adapter; equal arguments give equal bits.

    Args:
        slm: without adapters; given back so.
        private: D_i.
        start: the adapter to go on from; None: a fresh one.
        lora: of the adapter.
        training: optimizer steps, rows and rate.
        round_number: from 1.
        seed: the run's.
        stage: as `on_progress` names it.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`.

    Returns:
        The trained adapter, and `slm_ce`: the mean of the last tenth of the steps, nats a token.

    Raises:
        AdapterMismatch: `start` is not of this model and these settings.
        TrainingDiverged: see `training.train`.
    """
    config = lora_config(slm, **lora.model_dump())
    batches = draw_batches(
        row_sizes(private),
        batch_size=training.batch_size,
        steps=training.steps,
        seed=derive_seed(seed, "rows", round_number),
    )
    with adapted(slm, config, {"slm": derive_seed(seed, "slm_adapter") if start is None else start}) as lent:
        activate(lent, ["slm"], trainable=["slm"])
        losses = tune_adapter(
            lent,
            "slm",
            EncodedRows(lent, private, max_length=training.max_length),
            batches,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            gradient_clip=training.gradient_clip,
            precision=training.precision,
            gradient_checkpointing=training.gradient_checkpointing,
            micro_batch_size=training.micro_batch_size,
            seed=derive_seed(seed, "dropout", round_number),
            stage=stage,
            on_progress=on_progress,
            checkpoints=checkpoints,
        )
        return adapter_state(lent, "slm"), {"slm_ce": losses["cross_entropy"]}
