"""What a strategy needs and what it lets cross the network, as data. No torch: the API and a device's gate read it."""

from dataclasses import dataclass, field
from enum import StrEnum

from protocol.statuses import PartKind
from protocol.strategies.settings import AveragingSettings, StrategySettings


class SmallModel(StrEnum):
    """The small model whose adapter devices and server share."""

    NONE = "none"  # No adapter is shared.
    DISTILLED_PROXY = "distilled_proxy"  # A proxy (DPM) that the worker distils from the LLM; devices download it.
    DEVICES_OWN = "devices_own"  # The devices' own SLM, the same on all of them; the run names it in `slm`.


class DownloadKind(StrEnum):
    """What a device fetches for a round, beside the assignment itself."""

    PROXY_BASE = "proxy_base"  # The shared small model, once.
    MODEL_MANIFEST = "model_manifest"  # What the shared small model is, for a device that must have it already.
    ADAPTER = "adapter"  # theta_t: what the last round published for devices to start from.
    PROBE_SET = "probe_set"  # Public rows.
    LLM_VOCABULARY = "llm_vocabulary"  # The LLM's tokenizer, for who reads its logits; once.


class PublicSet(StrEnum):
    """Where the public, or auxiliary, rows live."""

    NOWHERE = "nowhere"  # None are needed; where a run has some, the server measures on them.
    SERVER = "server"  # The server trains on them; devices never see them.
    SERVER_AND_DEVICES = "server_and_devices"  # Likewise, and each device gets some of them: the probe set.


class PrivateRows(StrEnum):
    """Which private rows a device's step trains on."""

    OWN = "own"  # Its own, which never leave it.
    POOLED = "pooled"  # Those of all devices in one place: only where there are no devices but a simulation.


class MessageKind(StrEnum):
    """What crosses the network beside adapters, logits of a shared model, and the files above; each in one direction.

    Those that a device sends are parts of its update, under the same name in `PartKind`.
    """

    SLM_LOGITS = "slm_logits"  # Top-K probe-set distributions of a device's SLM, over its own token ids.
    LLM_LOGITS = "llm_logits"  # Top-K probe-set distributions of the LLM, from the server to all devices.
    CANDIDATES = "candidates"  # Rows that the LLM wrote from public ones, from the server to all devices.
    COUNTS = "counts"  # How many of the candidates of each seed, or task, a device kept.
    SLM_FEATURES = "slm_features"  # Pooled hidden states of a device's SLM on the probe set, in the common space.
    LLM_FEATURES = "llm_features"  # Those of the LLM, from the server to all devices.


@dataclass(frozen=True)
class StrategySpec:
    """A strategy, as far as it can be known without torch.

    Attributes:
        settings: the class of its settings; the default of their `name` is the strategy's.
        steps: `module:name` of what makes its `cotuning.strategies.interface.StrategySteps` from the settings: their
            class, or a function. Imported and called only where there is torch.
        uploads: the parts that every update has.
        downloads: the files that a device is given.
        messages_up: what else a device may send, at most one kind. A device sends nothing beyond these, and numbers.
        messages_down: what else all devices are sent, at most one kind. A device fetches nothing beyond these.
        small_model: whose adapter is shared.
        public_set: where the public, or auxiliary, rows live.
        trains_llm: whether the server trains the LLM's adapter.
        last_step: whether a device learns from the server's last message once more, after the last round.
        private_rows: which of them a device's step trains on.

    Raises:
        ValueError: parts of it contradict each other.
    """

    settings: type[StrategySettings]
    steps: str
    uploads: frozenset[PartKind] = field(default_factory=frozenset)
    downloads: frozenset[DownloadKind] = field(default_factory=frozenset)
    messages_up: frozenset[MessageKind] = field(default_factory=frozenset)
    messages_down: frozenset[MessageKind] = field(default_factory=frozenset)
    small_model: SmallModel = SmallModel.NONE
    public_set: PublicSet = PublicSet.NOWHERE
    trains_llm: bool = False
    last_step: bool = False
    private_rows: PrivateRows = PrivateRows.OWN

    def __post_init__(self) -> None:
        sends_delta = PartKind.ADAPTER_DELTA in self.uploads
        parts, messages = set[str](PartKind), set[str](MessageKind)
        rules = (
            (":" in self.steps, "`steps` as `module:name`"),
            (isinstance(self.settings.model_fields["name"].default, str), "settings with a default `name`"),
            (
                sends_delta == issubclass(self.settings, AveragingSettings),
                "`AveragingSettings` where devices upload an adapter_delta, and only there",
            ),
            (
                not sends_delta or self.small_model is not SmallModel.NONE,
                "a `small_model` for the adapter whose delta devices upload",
            ),
            (
                (DownloadKind.PROXY_BASE in self.downloads) == (self.small_model is SmallModel.DISTILLED_PROXY),
                "the download proxy_base where the small model is a distilled proxy, and only there",
            ),
            (
                (DownloadKind.MODEL_MANIFEST in self.downloads) == (self.small_model is SmallModel.DEVICES_OWN),
                "the download model_manifest where the small model is the devices' own, and only there",
            ),
            (
                (DownloadKind.PROBE_SET in self.downloads) == (self.public_set is PublicSet.SERVER_AND_DEVICES),
                "the download probe_set where devices get public rows, and only there",
            ),
            (
                len(self.messages_up) <= 1 and self.messages_up <= parts,
                "at most one kind of `messages_up`, one that is a part of an update",
            ),
            (not self.uploads & messages, "messages in `messages_up` and not in `uploads`"),
            (
                len(self.messages_down) <= 1 and not self.messages_down & parts,
                "at most one kind of `messages_down`, one that is no part of an update",
            ),
            (
                not self.last_step or bool(self.messages_down),
                "`messages_down` where a `last_step` learns from the last of them",
            ),
            (
                DownloadKind.LLM_VOCABULARY not in self.downloads or self.trains_llm,
                "the download llm_vocabulary only where the server trains the LLM",
            ),
        )
        for kept, rule in rules:
            if not kept:
                raise ValueError(f"strategy of {self.settings.__name__}: expected {rule}; got {self}")

    @property
    def name(self) -> str:
        """As runs name it."""
        return str(self.settings.model_fields["name"].default)

    @property
    def deployable(self) -> bool:
        """False for what exists in simulations only; `not_deployable_because` says why."""
        return self.not_deployable_because is None

    @property
    def not_deployable_because(self) -> str | None:
        """What it does that no deployment can, None where there is nothing."""
        if self.private_rows is not PrivateRows.OWN:
            return "trains on all devices' rows in one place"
        return None

    @property
    def sent_message(self) -> PartKind | None:
        """What a device's message is; None where it sends none. A device may leave it out."""
        return next((PartKind(kind) for kind in self.messages_up), None)

    @property
    def received_message(self) -> MessageKind | None:
        """What the server's message is; None where it sends none."""
        return next(iter(self.messages_down), None)

    @property
    def parts(self) -> frozenset[PartKind]:
        """All that an update can consist of."""
        return self.uploads if self.sent_message is None else self.uploads | {self.sent_message}

    @property
    def needs_llm(self) -> bool:
        """Whether a run of it names an LLM."""
        return self.trains_llm or self.small_model is SmallModel.DISTILLED_PROXY
