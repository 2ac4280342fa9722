"""What a strategy is to those that run it: worker, agent and simulator call this and nothing else of it.

A strategy has two halves. What must be known without torch (its settings, and as a `StrategySpec` what crosses the
network and what it needs) lives in `protocol.strategies` or, of a strategy that another distribution adds, wherever it
likes. What is computed is a `StrategySteps`; the spec names its class, and `registry.steps_of` makes one from a run's
settings. One round is, whoever runs it:

    device i    result_i = steps.device_step(DeviceInputs(...))        its delta and its logits travel, as far as the
                                                                       spec's `uploads` say; its adapters stay
    server      aggregator = steps.aggregator(theta_t, state)          where deltas came: one update at a time
                aggregator.add(delta_i, weight_i); aggregate = aggregator.result()
                read = steps.logits_reader(shared_model, probe)        where logits came: checked one by one
                steps.check_message(message_i, ServerInputs(...))      where messages came: likewise
                served = steps.server_step(ServerInputs(...))          the next theta, the next omega

Steps are pure: equal inputs give equal bits, models are given back as they were lent, nothing is read but the inputs
and the settings. So a simulation and a deployment with the same seeds give the same adapters.

What is neither an adapter nor logits of a shared model travels as a `Message`: FedMKT's logits, of every device's own
SLM and of the LLM; the candidates that a data-based strategy's LLM wrote, and the devices' counts of them; the features
of a feature-based one. The server's is published with the version that its step made, as theta and omega are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from cotuning.checkpoints import Checkpoints
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.payload import PayloadRows
from cotuning.strategies.aggregation import Aggregate, RoundAggregator
from cotuning.strategies.results import DeviceResult, Message, ServerResult
from cotuning.training import OnProgress
from cotuning.vocabulary import Reads
from protocol.strategies import StrategySettings

Settings = TypeVar("Settings", bound=StrategySettings)

LogitsReader = Callable[[Mapping[str, Tensor], Mapping[str, str]], PayloadRows]
"""Checks the tensors and the header of one device's logits; raises `PayloadError`."""


@dataclass(frozen=True)
class DeviceInputs:
    """What one device has in one round. What the spec does not ask for is None, or empty.

    One value and not arguments, so that a strategy written before an input was added still fits.

    Attributes:
        slm: f_i, without adapters; to be given back so.
        private: D_i; of these rows nothing but what the strategy declares may leave.
        slm_adapter: psi_i after the last round, None in the first.
        domain_adapter: phi_i after the last round, None in the first and where the strategy keeps none.
        shared_model: the distilled proxy, without adapters; None where the small model is none or the device's own.
        shared_adapter: theta_t, what the last round published.
        adapter_rank: at which this device trains theta; None: the run's own.
        probe: the public rows that the device was given.
        message: what the server sent all devices with the version that this round starts from.
        llm_vocabulary: the LLM's tokenizer, where the spec's `downloads` have it.
        round_number: from 1.
        seed: the run's; equal inputs give equal bits.
        on_progress: see `training.OnProgress`; what it raises ends the step.
        checkpoints: see `training.train`; each stage has its own.
    """

    slm: LanguageModel
    private: Sequence[Example]
    slm_adapter: Mapping[str, Tensor] | None
    round_number: int
    seed: int
    on_progress: OnProgress
    domain_adapter: Mapping[str, Tensor] | None = None
    shared_model: LanguageModel | None = None
    shared_adapter: Mapping[str, Tensor] | None = None
    adapter_rank: int | None = None
    probe: Sequence[Example] = ()
    message: Message | None = None
    llm_vocabulary: Reads | None = None
    checkpoints: Checkpoints | None = None


@dataclass(frozen=True)
class DeviceMessage:
    """What one device sent beside its delta, not yet checked.

    Attributes:
        tensors: by name.
        metadata: their header.
        num_examples: the device's weight.
        vocabulary: the tokenizer of its SLM, None where the spec's `uploads` have none.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    num_examples: int
    vocabulary: Reads | None = None


@dataclass(frozen=True)
class ServerInputs:
    """What the server has in one round, after aggregation. What the spec does not ask for is None, or empty.

    Attributes:
        llm: f_L, without adapters; to be given back so.
        shared_model: the distilled proxy, or the devices' own SLM; without adapters, to be given back so.
        shared_adapter: theta_bar, the aggregate; what the last round published where devices send no deltas.
        llm_adapter: omega after the last round, None in the first.
        public: D_pub without the probe rows.
        probe: Q.
        device_logits: from the `logits_reader`, one a device, in the order of the devices.
        device_messages: of those devices that sent one, in the order of the devices; each has passed `check_message`.
        message: what the devices were sent before they computed that.
        state: `ServerResult.state` of the round that made the version that this one starts from.
        round_number: from 1.
        seed: the run's; equal inputs give equal bits.
        on_progress: see `training.OnProgress`; what it raises ends the step.
        checkpoints: see `training.train`; each stage has its own.
    """

    round_number: int
    seed: int
    on_progress: OnProgress
    llm: LanguageModel | None = None
    shared_model: LanguageModel | None = None
    shared_adapter: Mapping[str, Tensor] | None = None
    llm_adapter: Mapping[str, Tensor] | None = None
    public: Sequence[Example] = ()
    probe: Sequence[Example] = ()
    device_logits: Sequence[PayloadRows] = ()
    device_messages: Sequence[DeviceMessage] = ()
    message: Message | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    checkpoints: Checkpoints | None = None


class Aggregator(Protocol):
    """Takes a round's deltas one by one."""

    def add(self, delta: Mapping[str, Tensor], weight: float, *, rank: int | None = None) -> float:
        """Count an update and return its L2 norm; see `RoundAggregator.add`."""
        ...

    def result(self) -> Aggregate:
        """What the updates so far make; see `RoundAggregator.result`."""
        ...


class StrategySteps(ABC, Generic[Settings]):
    """The steps of a strategy, as one run has set it. Only the device's step must be written.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """One device's round.

        Raises:
            CoverageTooLow: two tokenizers cannot be aligned on this data; nothing was trained.
            AdapterMismatch: an adapter is not of this model and these settings.
            TrainingDiverged: a loss or gradient is not finite.
        """

    def aggregator(
        self, shared_adapter: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor] | None
    ) -> Aggregator:
        """What makes theta_bar of the devices' deltas: a weighted mean, as the `AveragingSettings` say.

        Args:
            shared_adapter: theta_t.
            optimizer_state: `Aggregate.optimizer_state` of the round that made theta_t, None where there was none.

        Raises:
            ValueError: the strategy's settings have no such thing.
        """
        if self.settings.averaging is None:
            raise ValueError(f"expected a strategy whose devices send deltas, got {self.settings.name}")
        return RoundAggregator(shared_adapter, self.settings.averaging, optimizer_state)

    def logits_reader(self, shared_model: LanguageModel | None, probe: Sequence[Example]) -> LogitsReader:
        """What checks each device's logits of a round; called once a round, where `uploads` has logits.

        Raises:
            ValueError: the strategy's devices send none.
        """
        raise ValueError(f"expected a strategy whose devices send logits, got {self.settings.name}")

    @property
    def learns_from_logits(self) -> bool:
        """Whether `server_step` wants the devices' logits."""
        return self.settings.kept_classes is not None

    def check_message(self, sent: DeviceMessage, given: ServerInputs) -> None:
        """Refuse one device's message, before its update counts. Here: nothing is refused.

        That its values are finite was seen before.

        Args:
            sent: of one device.
            given: of the round, without models and without what devices sent.

        Raises:
            ValueError: it is not what this round asked for, or says what no device can have.
        """
        return

    def first_message(self, given: ServerInputs) -> Message | None:
        """What all devices are sent before the first round. Here: nothing."""
        return None

    def last_step(self, given: DeviceInputs) -> DeviceResult | None:
        """What a device does with the last message, once the run is completed; sends nothing. Here: nothing, None.

        Called only where the spec says `last_step`.
        """
        return None

    def server_step(self, given: ServerInputs) -> ServerResult:
        """The server's round, after aggregation. Here: the aggregate is published as it is, the LLM stays.

        Raises:
            CoverageTooLow: two tokenizers cannot be aligned on public rows; nothing was trained.
            AdapterMismatch: an adapter is not of this model and these settings.
            TrainingDiverged: a loss or gradient is not finite.
        """
        return ServerResult(_copied(given.shared_adapter), _copied(given.llm_adapter))


def _copied(state: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if state is None else dict(state)
