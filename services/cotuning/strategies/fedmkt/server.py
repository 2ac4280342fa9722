"""The server's round: omega learns from the best device on each probe row; the LLM's logits go to all devices."""

from collections.abc import Sequence
from contextlib import suppress

from cotuning.adapters import adapter_state
from cotuning.received_logits import Received
from cotuning.seeding import derive_seed
from cotuning.shared_rows import AlignmentStats, CoverageTooLow
from cotuning.strategies.fedmkt.student import Student, parse_logits
from cotuning.strategies.interface import DeviceMessage, ServerInputs
from cotuning.strategies.results import Message, ServerResult, TeacherRows
from cotuning.strategies.tuning import adapter_training, with_adapter
from protocol.strategies import FedMktSettings

SERVER_STAGE = "transfer_to_llm"


def check_message(sent: DeviceMessage, given: ServerInputs, settings: FedMktSettings) -> Received:
    """What a device's message says.

    Raises:
        PayloadError: see `parse_logits`.
    """
    assert sent.vocabulary is not None
    return parse_logits(sent.tensors, sent.metadata, vocabulary=sent.vocabulary, probe=given.probe, settings=settings)


def server_step(given: ServerInputs, settings: FedMktSettings) -> ServerResult:
    """The server's round: omega learns from the best device on each probe row that it is better on than the LLM.

    The LLM's logits leave as a message. The alignment is that of the least coverage, None where it was not measured.
    Under `fold`, a device whose tokenizer cannot be aligned with the LLM's on the probe set teaches nothing: it could
    not know before it was sent the LLM's logits, and the others are not to suffer.

    Args:
        given: the order of the devices decides between equal losses only.
        settings: of the strategy.

    Raises:
        PayloadError: see `parse_logits`.
        AdapterMismatch: the adapter is not of this model and these settings.
    """
    assert given.llm is not None
    server = settings.server
    received = [check_message(each, given, settings) for each in given.device_messages]
    with with_adapter(given.llm, "llm", given.llm_adapter, settings.llm_lora, seed=given.seed) as lent:
        student = Student(lent, "llm", given.probe, settings)
        alignments, heard = _heard(student, received)
        teacher_of_row = student.teachers([received[place] for place in heard])
        options = adapter_training(server, given, stage=SERVER_STAGE, betas=student.betas)
        losses = student.learn(
            [received[place] for place in heard],
            teacher_of_row,
            server,
            steps=server.steps,
            row_seed=derive_seed(given.seed, "transfer_rows", given.round_number),
            options=options,
        )
        taught = [heard[teacher] for teacher in teacher_of_row.values()]
        rows_taught = [taught.count(place) for place in range(len(received))]
        return ServerResult(
            shared_adapter=None,
            message=Message(*student.payload()),
            llm_adapter=adapter_state(lent, "llm"),
            losses=losses,
            alignment=min(alignments, key=lambda each: each.coverage, default=None),
            teacher=TeacherRows(len(given.probe), [0] * len(received), rows_taught),
        )


def _heard(student: Student, received: Sequence[Received]) -> tuple[list[AlignmentStats], list[int]]:
    """The alignments of those that the LLM can be taught by, and their places in `received`."""
    alignments: list[AlignmentStats] = []
    heard: list[int] = []
    for place, sender in enumerate(received):
        with suppress(CoverageTooLow):
            alignments += student.alignments([sender])
            heard.append(place)
    return alignments, heard
