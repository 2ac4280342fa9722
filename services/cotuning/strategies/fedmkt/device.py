"""A device's round: psi_i learns from the LLM's logits, then from the private rows; its own logits leave."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cotuning.adapters import adapter_state
from cotuning.checkpoints import Checkpoints
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.received_logits import Received
from cotuning.seeding import derive_seed
from cotuning.shared_rows import AlignmentStats
from cotuning.strategies.fedmkt.student import Steps, Student
from cotuning.strategies.results import DeviceResult
from cotuning.strategies.tuning import adapter_training, tune_locally, with_adapter
from cotuning.training import OnProgress
from protocol.strategies import FedMktSettings

LOCAL_STAGE = "local_tuning"
TRANSFER_STAGE = "transfer_from_llm"


def device_step(
    *,
    slm: LanguageModel,
    private: Sequence[Example],
    probe: Sequence[Example],
    llm_logits: Received | None,
    slm_adapter: Mapping[str, Tensor] | None,
    settings: FedMktSettings,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> DeviceResult:
    """One device's round: psi_i learns from the LLM's logits, then from the private rows; logits on the probe set.

    Args:
        slm: without adapters; given back so.
        private: D_i.
        probe: Q, public.
        llm_logits: from `parse_logits`, what the server sent at the end of the last round; None in the first.
        slm_adapter: psi_i after the last round, None in the first.
        settings: of the strategy.
        round_number: from 1.
        seed: the run's; equal arguments give equal bits.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`; each stage has its own.

    Raises:
        CoverageTooLow: under `fold`, the tokenizers cannot be aligned on the probe set; nothing was trained.
        AdapterMismatch: the adapter is not of this model and these settings.
    """
    with with_adapter(slm, "slm", slm_adapter, settings.slm_lora, seed=seed) as lent:
        student = Student(lent, "slm", probe, settings)
        losses, alignment = _learn_on_device(
            student, llm_logits, round_number=round_number, seed=seed, on_progress=on_progress, checkpoints=checkpoints
        )
        losses |= tune_locally(
            lent,
            private,
            settings.training,
            round_number=round_number,
            seed=seed,
            stage=LOCAL_STAGE,
            on_progress=on_progress,
            checkpoints=checkpoints,
            betas=student.betas,
        )
        logits, metadata = student.payload()
        return _device_result(lent, losses, alignment, num_examples=len(private), logits=logits, metadata=metadata)


def last_transfer(
    *,
    slm: LanguageModel,
    probe: Sequence[Example],
    llm_logits: Received,
    slm_adapter: Mapping[str, Tensor] | None,
    settings: FedMktSettings,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> DeviceResult:
    """What a device does with the LLM's logits after the last round; it sends nothing.

    Args: as for `device_step`; `round_number` is that of the round that is not held any more.

    Raises:
        CoverageTooLow, AdapterMismatch: as `device_step`.
    """
    with with_adapter(slm, "slm", slm_adapter, settings.slm_lora, seed=seed) as lent:
        losses, alignment = _learn_on_device(
            Student(lent, "slm", probe, settings),
            llm_logits,
            round_number=round_number,
            seed=seed,
            on_progress=on_progress,
            checkpoints=checkpoints,
        )
        return _device_result(lent, losses, alignment, num_examples=0, logits={}, metadata={})


def _learn_on_device(
    student: Student,
    llm_logits: Received | None,
    *,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None,
) -> tuple[dict[str, float], AlignmentStats | None]:
    """psi_i learns from the LLM where it does better."""
    settings = student.settings
    if llm_logits is None:
        return {}, None
    training = settings.training
    options = adapter_training(
        training,
        seed=derive_seed(seed, TRANSFER_STAGE, round_number),
        stage=TRANSFER_STAGE,
        on_progress=on_progress,
        checkpoints=checkpoints,
        betas=student.betas,
    )
    alignments = student.alignments([llm_logits])
    losses = student.learn(
        [llm_logits],
        student.teachers([llm_logits]),
        Steps(settings.transfer_steps, training.batch_size, training.micro_batch_size, training.precision),
        row_seed=derive_seed(seed, "transfer_rows", round_number),
        options=options,
    )
    return losses, alignments[0] if alignments else None


def _device_result(
    lm: LanguageModel,
    losses: dict[str, float],
    alignment: AlignmentStats | None,
    *,
    num_examples: int,
    logits: dict[str, Tensor],
    metadata: dict[str, str],
) -> DeviceResult:
    return DeviceResult(
        logits=logits,
        logits_metadata=metadata,
        slm_adapter=adapter_state(lm, "slm"),
        num_examples=num_examples,
        losses=losses,
        alignment=alignment,
    )
