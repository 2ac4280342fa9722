"""The rounds of one run in one process: the steps, seeds and wire forms of a deployment, without its network.

Devices are played one after the other in their order, which stands for the order of the ids that a deployment adds
updates up in. One that drops out leaves no trace: its state, as an agent's, is that of its last update that came.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from cotuning.adapters import AdapterMismatch, AdapterState
from cotuning.examples import Example
from cotuning.language_model import UnknownHead
from cotuning.shared_rows import CoverageTooLow
from cotuning.strategies.combining import Combined, SentUpdate, combine
from cotuning.strategies.interface import DeviceInputs, DeviceMessage, ServerInputs, StrategySteps
from cotuning.strategies.preparation import first_adapter
from cotuning.strategies.promotion import LLM, SMALL, candidates, not_worse
from cotuning.strategies.registry import steps_of
from cotuning.strategies.results import DeviceResult, Message, ServerResult
from cotuning.training import OnProgress, TrainingDiverged
from protocol.statuses import PartKind
from protocol.strategies import DownloadKind, PrivateRows, PublicSet, StrategySettings, StrategySpec, spec_of
from simulation.base_models import BaseModels
from simulation.budget import Meter
from simulation.errors import RoundFailed
from simulation.participation import RoundPlan
from simulation.prepared import Bits, Prepared, validation_bits
from simulation.setup import Device
from simulation.wire import Part, Published, Wire, wire

_FAILURES = (CoverageTooLow, AdapterMismatch, UnknownHead, TrainingDiverged)
"""What a step says that cannot be done with these models and rows."""


@dataclass(frozen=True)
class Version:
    """What a round left, as a deployment's version: theta and omega, and whether the next round starts from them."""

    number: int
    shared_adapter: AdapterState | None
    llm_adapter: AdapterState | None
    promoted: bool = True
    message: Message | None = None
    """To all devices, for the next round."""
    server_state: Mapping[str, Tensor] = field(default_factory=dict)
    """What the server keeps for its next round, beside adapters."""


@dataclass
class Local:
    """What stays on a device between rounds."""

    slm_adapter: AdapterState | None = None
    domain_adapter: AdapterState | None = None


@dataclass
class Run:
    """One run under way.

    Attributes:
        settings: of the strategy.
        devices: all of them, in order.
        models: the base models.
        prepared: what round 1 starts from.
        seed: of the run.
        tolerance: bits per byte by which a version may be worse and still be promoted.
        meter: measures it.
        on_progress: told who (a device's name, `llm`), and as `training.OnProgress`.
        base: the newest promoted version.
        local: device -> what it keeps.
        notes: what a reader of the results must know.
    """

    settings: StrategySettings
    devices: Sequence[Device]
    models: BaseModels
    prepared: Prepared
    seed: int
    tolerance: float
    meter: Meter
    on_progress: Callable[[str, str, int, int], None]
    base: Version = field(init=False)
    local: dict[str, Local] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _optimizer_state: AdapterState = field(default_factory=dict)
    _reference: Mapping[str, Bits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make version 0."""
        given, settings, small = self.prepared, self.settings, self.prepared.shared_model
        theta = omega = None
        if settings.shared_lora is not None and small is not None:
            theta = first_adapter(small, settings.shared_lora, "shared_adapter", seed=self.seed)
        if settings.trained_llm_lora is not None and given.llm is not None:
            omega = first_adapter(given.llm, settings.trained_llm_lora, "llm_adapter", seed=self.seed)
        with self.meter.stage("server"), _told("before round 1, server"):
            first = self._steps.first_message(self._server_inputs(0, theta, omega))
        self.base = Version(0, theta, omega, message=first)
        self.local = {device.name: Local() for device in self.devices}
        models = {name: lm for name, lm in ((LLM, given.llm), (SMALL, small)) if lm is not None}
        with self.meter.stage("evaluation"):  # a fresh adapter changes nothing
            self._reference = validation_bits(models, self._validation, settings)

    def play(self, plans: Sequence[RoundPlan], on_version: Callable[[Version], None] = lambda _: None) -> None:
        """Play the rounds.

        Args:
            plans: who takes part in each.
            on_version: told each version, version 0 too.

        Raises:
            RoundFailed: a step cannot be done, or no update counts.
        """
        on_version(self.base)
        with wire(self.spec, self.prepared, self.meter) as network:
            for number, plan in enumerate(plans, start=1):
                on_version(self._round(number, plan, network))
            self._last_steps(len(plans), network)

    @property
    def spec(self) -> StrategySpec:
        """The strategy's."""
        return spec_of(self.settings)

    @property
    def _steps(self) -> StrategySteps[Any]:
        return steps_of(self.settings)

    @property
    def _validation(self) -> Sequence[Example]:
        return self.prepared.rows.validation if self.prepared.rows is not None else ()

    @property
    def _probe(self) -> Sequence[Example]:
        return self.prepared.rows.probe if self.prepared.rows is not None else ()

    def _round(self, number: int, plan: RoundPlan, network: Wire) -> Version:
        published = network.publish(self.base.shared_adapter, self.base.message)
        chosen = [self.devices[place] for place in plan.chosen]
        self.meter.take_part(number, [device.name for device in chosen])
        for device in chosen:
            network.download(device.name, number, published)
        results: dict[str, DeviceResult] = {}
        parts: dict[str, dict[PartKind, Part]] = {}
        messages: dict[str, DeviceMessage] = {}
        for place in plan.delivering:
            device = self.devices[place]
            with self.meter.stage("devices"):
                result = self._device_step(device, number, published)
                results[device.name] = result
                parts[device.name] = network.upload(device.name, number, result)
                messages |= self._sent_message(device, number, result, network)
                self.local[device.name] = Local(result.slm_adapter, result.domain_adapter)
        with self.meter.stage("aggregation"):
            combined = self._combine(number, results, parts, messages)
        with self.meter.stage("server"):
            counted = [messages[name] for name in combined.counted if name in messages]
            served = self._serve(number, combined, parts, counted)
        with self.meter.stage("evaluation"):
            return self._judge(number, combined, served)

    def _device_step(self, device: Device, number: int, published: Published) -> DeviceResult:
        with _told(f"round {number}, {device.name}"):
            return self._steps.device_step(self._device_inputs(device, number, published))

    def _device_inputs(self, device: Device, number: int, published: Published) -> DeviceInputs:
        local = self.local[device.name]
        return DeviceInputs(
            slm=self.models.slm(device.slm),
            private=self._private(device),
            slm_adapter=local.slm_adapter,
            domain_adapter=local.domain_adapter,
            shared_model=self.prepared.shared_model if DownloadKind.PROXY_BASE in self.spec.downloads else None,
            shared_adapter=published.adapter,
            adapter_rank=self.settings.assigned_rank(device.rank),
            probe=self._probe if DownloadKind.PROBE_SET in self.spec.downloads else (),
            message=published.message,
            llm_vocabulary=published.llm_vocabulary,
            round_number=number,
            seed=self.seed,
            on_progress=self._note(device.name),
        )

    def _sent_message(
        self, device: Device, number: int, result: DeviceResult, network: Wire
    ) -> dict[str, DeviceMessage]:
        vocabulary = network.upload_vocabulary(device.name, number, self.models.slm(device.slm))
        message = network.upload_message(device.name, number, result)
        if message is None:
            return {}
        sent = DeviceMessage(message.tensors, message.metadata, result.num_examples, vocabulary)
        return {device.name: sent}

    def _last_steps(self, rounds: int, network: Wire) -> None:
        """What devices do with the last message; it is of the last round, which its bytes are counted under."""
        if not self.spec.last_step:
            return
        published = network.publish(self.base.shared_adapter, self.base.message)
        for device in self.devices:
            with self.meter.stage("devices"), _told(f"after the last round, {device.name}"):
                result = self._steps.last_step(self._device_inputs(device, rounds + 1, published))
                if result is not None:
                    network.download_message(device.name, rounds, published)
                    self.local[device.name] = Local(result.slm_adapter, result.domain_adapter)

    def _private(self, device: Device) -> Sequence[Example]:
        if self.spec.private_rows is PrivateRows.OWN:
            return device.rows.train
        return [row for each in self.devices for row in each.rows.train]

    def _combine(
        self,
        number: int,
        results: Mapping[str, DeviceResult],
        parts: Mapping[str, Mapping[PartKind, Part]],
        messages: Mapping[str, DeviceMessage],
    ) -> Combined:
        """As a deployment adds up, in the order of the devices."""
        uploads = self.spec.uploads
        if not self.spec.parts:
            return Combined(counted=list(results))
        aggregator = None
        if PartKind.ADAPTER_DELTA in uploads:
            assert self.base.shared_adapter is not None
            aggregator = self._steps.aggregator(self.base.shared_adapter, self._optimizer_state or None)
        reads = PartKind.LOGITS in uploads
        combined = combine(
            [self._sent(name, result, parts[name], messages.get(name)) for name, result in results.items()],
            self.settings,
            aggregator=aggregator,
            logits=self._steps.logits_reader(self.prepared.shared_model, self._probe) if reads else None,
            message=partial(self._check_message, number) if self.spec.messages_up else None,
        )
        for name, (code, reason) in combined.refused.items():
            self.notes.append(f"round {number}: the update of {name} was not counted ({code}): {reason}")
        if not combined.counted:
            raise RoundFailed(f"round {number}: expected at least one update that counts; {'; '.join(self.notes)}")
        return combined

    def _check_message(self, number: int, sent: DeviceMessage) -> None:
        given = replace(self._server_inputs(number, None, None), llm=None, shared_model=None)
        self._steps.check_message(sent, replace(given, message=self.base.message, state=self.base.server_state))

    def _sent(
        self, name: str, result: DeviceResult, parts: Mapping[PartKind, Part], message: DeviceMessage | None
    ) -> SentUpdate:
        rank = next(self.settings.assigned_rank(each.rank) for each in self.devices if each.name == name)
        return SentUpdate(
            key=name,
            num_examples=result.num_examples,
            coverage=result.alignment.coverage if result.alignment is not None else None,
            read_delta=lambda: parts[PartKind.ADAPTER_DELTA][0],
            read_logits=lambda: parts[PartKind.LOGITS],
            read_message=lambda: message,
            rank=rank,
        )

    def _serve(
        self,
        number: int,
        combined: Combined,
        parts: Mapping[str, Mapping[PartKind, Part]],
        messages: Sequence[DeviceMessage],
    ) -> ServerResult:
        aggregate, steps = combined.aggregate, self._steps
        theta = aggregate.adapter if aggregate is not None else self.base.shared_adapter
        given = self._server_inputs(number, theta, self.base.llm_adapter)
        read = []
        if (
            self._trains_on_public
            and combined.counted
            and steps.learns_from_logits
            and PartKind.LOGITS in self.spec.uploads
        ):
            check = steps.logits_reader(self.prepared.shared_model, self._probe)
            read = [check(*parts[name][PartKind.LOGITS]) for name in combined.counted]
        base = self.base
        given = replace(
            given, device_logits=read, device_messages=messages, message=base.message, state=base.server_state
        )
        with _told(f"round {number}, server"):
            return steps.server_step(given)

    @property
    def _trains_on_public(self) -> bool:
        return self.spec.public_set is not PublicSet.NOWHERE

    def _server_inputs(self, number: int, theta: AdapterState | None, omega: AdapterState | None) -> ServerInputs:
        """A strategy that trains nothing on public rows is given neither models nor rows, as in a deployment."""
        given = ServerInputs(
            round_number=number,
            seed=self.seed,
            on_progress=self._note(LLM),
            shared_adapter=theta,
            llm_adapter=omega,
        )
        if not self._trains_on_public:
            return given
        assert self.prepared.rows is not None
        return replace(
            given,
            llm=self.prepared.llm if self.spec.trains_llm else None,
            shared_model=self.prepared.shared_model,
            public=self.prepared.rows.training,
            probe=self.prepared.rows.probe,
        )

    def _judge(self, number: int, combined: Combined, served: ServerResult) -> Version:
        """Promote what is not worse; else the next round starts from the version that this one started from."""
        trained = self.prepared.llm if self.spec.trains_llm else None
        with candidates(
            self.settings,
            llm=trained,
            shared_model=self.prepared.shared_model,
            shared_adapter=served.shared_adapter,
            llm_adapter=served.llm_adapter,
        ) as models:
            bits = validation_bits(models, self._validation, self.settings)
        promoted = not_worse(bits, self._reference, self.tolerance)
        version = Version(
            number, served.shared_adapter, served.llm_adapter, promoted, served.message, dict(served.state)
        )
        if promoted:
            self.base, self._reference = version, bits
            if combined.aggregate is not None:
                self._optimizer_state = combined.aggregate.optimizer_state
        else:
            told = ", ".join(f"{name} {each.bits_per_byte:.3f}" for name, each in bits.items())
            self.notes.append(f"round {number} was not promoted: bits per byte on public validation rows {told}")
        return version

    def _note(self, who: str) -> OnProgress:
        return partial(_tell, self.meter, self.on_progress, who)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Say of a step that cannot be done where it was."""
    try:
        yield
    except _FAILURES as error:
        raise RoundFailed(f"{where}: {error}") from error


def _tell(  # noqa: PLR0917
    meter: Meter,
    on_progress: Callable[[str, str, int, int], None],
    who: str,
    stage: str,
    step: int,
    steps: int,
    losses: Mapping[str, Any],
) -> None:
    """Count steps as they are taken, and pass them on."""
    del losses
    if step:
        meter.count_steps(f"{who}: {stage}", 1)
    on_progress(who, stage, step, steps)
