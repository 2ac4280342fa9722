"""The server's round: omega learns from the best device on each probe row; the LLM's logits go to all devices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cotuning.adapters import AdapterState, adapter_state
from cotuning.checkpoints import Checkpoints
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.received_logits import Received
from cotuning.seeding import derive_seed
from cotuning.shared_rows import AlignmentStats
from cotuning.strategies.fedmkt.student import Steps, Student
from cotuning.strategies.tuning import server_training, with_adapter
from cotuning.training import OnProgress
from protocol.strategies import FedMktSettings

SERVER_STAGE = "transfer_to_llm"


@dataclass(frozen=True)
class ServerResult:
    """The server's share of a round.

    Attributes:
        llm_adapter: omega.
        logits: the LLM's probe-set payload, for all devices.
        logits_metadata: its header.
        losses: means of the last tenth of the steps; empty where no row was kept.
        rows_taught: for each device, in the order given, the probe rows on which it taught.
        alignments: for each device, of the probe set; empty where it was not measured.
    """

    llm_adapter: AdapterState
    logits: dict[str, Tensor]
    logits_metadata: dict[str, str]
    losses: dict[str, float] = field(default_factory=dict)
    rows_taught: list[int] = field(default_factory=list)
    alignments: list[AlignmentStats] = field(default_factory=list)


def server_step(
    *,
    llm: LanguageModel,
    probe: Sequence[Example],
    llm_adapter: Mapping[str, Tensor] | None,
    device_logits: Sequence[Received],
    settings: FedMktSettings,
    round_number: int,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> ServerResult:
    """The server's round: omega learns from the best device on each probe row that it is better on than the LLM.

    Args:
        llm: without adapters; given back so.
        probe: Q.
        llm_adapter: omega after the last round, None in the first.
        device_logits: from `parse_logits`, one a device; their order decides between equal losses only.
        settings: of the strategy.
        round_number: from 1.
        seed: the run's.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`.

    Raises:
        CoverageTooLow: under `fold`, a device's tokenizer cannot be aligned on the probe set; nothing was trained.
        AdapterMismatch: the adapter is not of this model and these settings.
    """
    server = settings.server
    with with_adapter(llm, "llm", llm_adapter, settings.llm_lora, seed=seed) as lent:
        student = Student(lent, "llm", probe, settings)
        alignments = student.alignments(device_logits)
        teacher_of_row = student.teachers(device_logits)
        options = server_training(
            server,
            seed=derive_seed(seed, SERVER_STAGE, round_number),
            stage=SERVER_STAGE,
            on_progress=on_progress,
            checkpoints=checkpoints,
            betas=student.betas,
        )
        losses = student.learn(
            device_logits,
            teacher_of_row,
            Steps(server.steps, server.batch_size, server.micro_batch_size, server.precision),
            row_seed=derive_seed(seed, "transfer_rows", round_number),
            options=options,
        )
        logits, metadata = student.payload()
        taught = list(teacher_of_row.values())
        return ServerResult(
            llm_adapter=adapter_state(lent, "llm"),
            logits=logits,
            logits_metadata=metadata,
            losses=losses,
            rows_taught=[taught.count(place) for place in range(len(device_logits))],
            alignments=alignments,
        )
