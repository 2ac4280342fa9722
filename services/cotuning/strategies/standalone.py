"""Each device by itself: psi_i on D_i by cross-entropy. The baseline that co-tuning has to beat."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cotuning.adapters import activate, adapted, adapter_state, lora_config
from cotuning.checkpoints import Checkpoints
from cotuning.encoded_rows import EncodedRows
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.seeding import derive_seed
from cotuning.strategies.interface import DeviceInputs, StrategySteps
from cotuning.strategies.results import DeviceResult
from cotuning.training import OnProgress, draw_batches, row_sizes, tune_adapter
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
    training = settings.training
    config = lora_config(slm, **settings.slm_lora.model_dump())
    start = slm_adapter if slm_adapter is not None else derive_seed(seed, "slm_adapter")
    batches = draw_batches(
        row_sizes(private),
        batch_size=training.batch_size,
        steps=training.steps,
        seed=derive_seed(seed, "rows", round_number),
    )
    with adapted(slm, config, {"slm": start}) as lent:
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
            stage=STAGE,
            on_progress=on_progress,
            checkpoints=checkpoints,
        )
        tuned = adapter_state(lent, "slm")
    return DeviceResult(
        delta={},
        logits={},
        logits_metadata={},
        domain_adapter=None,
        slm_adapter=tuned,
        num_examples=len(private),
        losses={f"slm_{'ce' if name == 'cross_entropy' else name}": value for name, value in losses.items()},
        alignment=None,
    )


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
