"""A device by itself: one adapter of the SLM learns the private rows by cross-entropy, for one round."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cotuning.adapters import AdapterState, adapter_state
from cotuning.checkpoints import Checkpoints
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.strategies.tuning import tune_locally, with_adapter
from cotuning.training import OnProgress
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
    with with_adapter(slm, "slm", start, lora, seed=seed) as lent:
        losses = tune_locally(
            lent,
            private,
            training,
            round_number=round_number,
            seed=seed,
            stage=stage,
            on_progress=on_progress,
            checkpoints=checkpoints,
        )
        return adapter_state(lent, "slm"), losses
