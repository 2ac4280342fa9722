"""A device by itself: one adapter of the SLM learns the private rows by cross-entropy, for one round."""

from collections.abc import Mapping

from torch import Tensor

from cotuning.adapters import AdapterState, adapter_state
from cotuning.strategies.interface import DeviceInputs
from cotuning.strategies.tuning import tune_locally, with_adapter
from protocol.strategies import StrategySettings


def tune_on_private_rows(
    given: DeviceInputs, settings: StrategySettings, *, start: Mapping[str, Tensor] | None, stage: str
) -> tuple[AdapterState, dict[str, float]]:
    """Train the adapter; equal arguments give equal bits.

    Args:
        given: of the round.
        settings: of the strategy.
        start: the adapter to go on from; None: a fresh one.
        stage: as `on_progress` names it.

    Returns:
        The trained adapter, and `slm_ce`: the mean of the last tenth of the steps, nats a token.

    Raises:
        AdapterMismatch: `start` is not of this model and these settings.
        TrainingDiverged: see `training.train`.
    """
    with with_adapter(given.slm, "slm", start, settings.slm_lora, seed=given.seed) as lent:
        losses = tune_locally(lent, given, settings.training, stage=stage)
        return adapter_state(lent, "slm"), losses
