"""A device's round: psi_i learns from the LLM's logits, then from the private rows; its own logits leave."""

from cotuning.adapters import adapter_state
from cotuning.received_logits import Received
from cotuning.seeding import derive_seed
from cotuning.shared_rows import AlignmentStats
from cotuning.strategies.fedmkt.student import Student, parse_logits
from cotuning.strategies.interface import DeviceInputs
from cotuning.strategies.results import DeviceResult, Message
from cotuning.strategies.tuning import adapter_training, tune_locally, with_adapter
from protocol.strategies import FedMktSettings

LOCAL_STAGE = "local_tuning"
TRANSFER_STAGE = "transfer_from_llm"


def device_step(given: DeviceInputs, settings: FedMktSettings) -> DeviceResult:
    """One device's round: psi_i learns from the LLM's logits, then from the private rows; logits on the probe set.

    Args:
        given: `message` is what the server sent at the end of the last round, None in the first.
        settings: of the strategy.

    Raises:
        PayloadError: see `parse_logits`.
        CoverageTooLow: under `fold`, the tokenizers cannot be aligned on the probe set; nothing was trained.
        AdapterMismatch: the adapter is not of this model and these settings.
    """
    llm_logits = _of_llm(given, settings)
    with with_adapter(given.slm, "slm", given.slm_adapter, settings.slm_lora, seed=given.seed) as lent:
        student = Student(lent, "slm", given.probe, settings)
        losses, alignment = _learn_from_llm(student, llm_logits, given) if llm_logits else ({}, None)
        losses |= tune_locally(lent, given, settings.training, stage=LOCAL_STAGE, betas=student.betas)
        return DeviceResult(
            slm_adapter=adapter_state(lent, "slm"),
            num_examples=len(given.private),
            losses=losses,
            alignment=alignment,
            message=Message(*student.payload()),
        )


def last_transfer(given: DeviceInputs, settings: FedMktSettings) -> DeviceResult | None:
    """What a device does with the LLM's logits after the last round; it sends nothing. None where none came.

    Args:
        given: `round_number` is that of the round that is not held any more.
        settings: of the strategy.

    Raises:
        PayloadError, CoverageTooLow, AdapterMismatch: as `device_step`.
    """
    llm_logits = _of_llm(given, settings)
    if llm_logits is None:
        return None
    with with_adapter(given.slm, "slm", given.slm_adapter, settings.slm_lora, seed=given.seed) as lent:
        losses, alignment = _learn_from_llm(Student(lent, "slm", given.probe, settings), llm_logits, given)
        return DeviceResult(adapter_state(lent, "slm"), num_examples=0, losses=losses, alignment=alignment)


def _of_llm(given: DeviceInputs, settings: FedMktSettings) -> Received | None:
    if given.message is None:
        return None
    assert given.llm_vocabulary is not None
    return parse_logits(
        given.message.tensors,
        given.message.metadata,
        vocabulary=given.llm_vocabulary,
        probe=given.probe,
        settings=settings,
    )


def _learn_from_llm(
    student: Student, llm_logits: Received, given: DeviceInputs
) -> tuple[dict[str, float], AlignmentStats | None]:
    """psi_i learns from the LLM where it does better."""
    settings, training = student.settings, student.settings.training
    options = adapter_training(training, given, stage=TRANSFER_STAGE, betas=student.betas)
    alignments = student.alignments([llm_logits])
    losses = student.learn(
        [llm_logits],
        student.teachers([llm_logits]),
        training,
        steps=settings.transfer_steps,
        row_seed=derive_seed(given.seed, "transfer_rows", given.round_number),
        options=options,
    )
    return losses, alignments[0] if alignments else None
