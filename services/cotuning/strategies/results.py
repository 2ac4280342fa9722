"""What a strategy's steps give back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cotuning.adapters import AdapterState
from cotuning.examples import Example
from cotuning.shared_rows import AlignmentStats


@dataclass(frozen=True)
class Message:
    """What crosses the network beside adapters and logits, as the spec's `messages_up` and `messages_down` say.

    Attributes:
        tensors: by name.
        metadata: their header.
        rows: public rows, or rows made of public ones; only from the server to devices.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    rows: list[Example] = field(default_factory=list)


def only_tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The one tensor that a message consists of.

    Raises:
        ValueError: it is not there, or there are others.
    """
    if set(tensors) != {name}:
        raise ValueError(f"expected a message of the tensor {name!r} alone, got {sorted(tensors)}")
    return tensors[name]


@dataclass(frozen=True)
class DeviceResult:
    """One device's share of a round. Only `delta`, `logits` and `message` (and numbers) may leave the device.

    Attributes:
        slm_adapter: psi_i: what this device's SLM is used with, and given back in the next round; never leaves.
        num_examples: weight of the update: private rows trained on.
        losses: means of the last tenth of the steps, nats.
        delta: trained minus received shared adapter; empty where the strategy sends none.
        logits: the proxy's probe-set payload; empty where the strategy sends none.
        logits_metadata: its header.
        domain_adapter: phi_i, for the next round; never leaves.
        alignment: of the private rows, None where nothing was aligned.
        message: what else leaves.
    """

    slm_adapter: AdapterState
    num_examples: int
    losses: dict[str, float]
    delta: AdapterState = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    logits_metadata: dict[str, str] = field(default_factory=dict)
    domain_adapter: AdapterState | None = None
    alignment: AlignmentStats | None = None
    message: Message | None = None


@dataclass(frozen=True)
class TeacherRows:
    """How much of the devices' logits became a teacher.

    Attributes:
        num_probe_rows: rows that every device answered.
        proxy_rows: for each device, in the order given, the rows on which it teaches the proxy.
        llm_rows: likewise for the LLM; none where its tokenizer is not the proxy's.
    """

    num_probe_rows: int
    proxy_rows: list[int]
    llm_rows: list[int]


@dataclass(frozen=True)
class ServerResult:
    """The cloud's share of a round.

    Attributes:
        shared_adapter: theta, which the next round starts from; None where the strategy shares nothing.
        llm_adapter: omega; None where the strategy has no LLM.
        losses: means of the last tenth of the steps, nats.
        alignment: of the rows used, None for no steps.
        teacher: what the devices' logits were used for.
        message: to all devices, for the next round.
        state: what the server keeps for its next round, beside adapters.
    """

    shared_adapter: AdapterState | None
    llm_adapter: AdapterState | None
    losses: dict[str, float] = field(default_factory=dict)
    alignment: AlignmentStats | None = None
    teacher: TeacherRows | None = None
    message: Message | None = None
    state: AdapterState = field(default_factory=dict)
