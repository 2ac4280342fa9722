"""Each device by itself: psi_i on D_i by cross-entropy. The baseline that co-tuning has to beat."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cotuning.checkpoints import Checkpoints
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.strategies.interface import DeviceInputs, StrategySteps
from cotuning.strategies.local_tuning import tune_on_private_rows
from cotuning.strategies.results import DeviceResult
from cotuning.training import OnProgress
from protocol.strategies import StandaloneSettings

STAGE = "standalone_tuning"


def device_step(
    *,
    slm: LanguageModel,
    private: Sequence[Example],
    slm_adapter: Mapping[str, Tensor] | None,
    settings: StandaloneSettings,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> DeviceResult:
    """Train psi_i on the private rows for one round; nothing but numbers leaves.

    Args:
        slm: without adapters; given back so.
        private: D_i.
        slm_adapter: psi_i after the last round, None in the first.
        settings: of the strategy.
        round_number: from 1.
        seed: the run's; equal arguments give equal bits.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`; each stage has its own.
    """
    tuned, losses = tune_on_private_rows(
        slm=slm,
        private=private,
        start=slm_adapter,
        lora=settings.slm_lora,
        training=settings.training,
        round_number=round_number,
        seed=seed,
        stage=STAGE,
        on_progress=on_progress,
        checkpoints=checkpoints,
    )
    return DeviceResult(slm_adapter=tuned, num_examples=len(private), losses=losses)


class Standalone(StrategySteps[StandaloneSettings]):
    """Each device by itself; the server has nothing to do."""

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """As the function of this name."""
        return device_step(
            slm=given.slm,
            private=given.private,
            slm_adapter=given.slm_adapter,
            settings=self.settings,
            round_number=given.round_number,
            seed=given.seed,
            on_progress=given.on_progress,
            checkpoints=given.checkpoints,
        )
