"""Runs, rounds and model versions, as operators create and see them."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from protocol.base import MAX_COUNT, Name, RequestModel, ResponseModel, SettingsModel, Sha256, Timestamp
from protocol.errors import ErrorCode
from protocol.federations import DEFAULT_FEDERATION, FederationName
from protocol.proxy_settings import ProxySettings
from protocol.statuses import AssignmentStatus, RoundStatus, RunStatus, WaitingFor
from protocol.strategies import PublicSet, SmallModel, Strategy, spec_of


class ModelLoading(SettingsModel):
    """How the worker holds the LLM, and on which of its devices it trains."""

    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of the LLM's frozen weights.")
    four_bit: bool = Field(
        default=False, description="Its linear layers in 4 bits (NF4); needs bitsandbytes. Cannot be pruned."
    )
    devices: Literal["cpu", "auto"] = Field(
        default="cpu", description="`auto`: every GPU that is there, the LLM's layers dealt over them; else the CPU."
    )
    check_memory: bool = Field(
        default=True, description="Refuse a run whose training is expected not to fit into the devices' memory."
    )


class EvaluationSettings(SettingsModel):
    """What is measured, and on how many rows. Greedy decoding."""

    validation_rows: int = Field(
        default=64, ge=1, description="Public rows held out to decide whether a version is promoted."
    )
    test_rows: int = Field(default=200, ge=0, description="At most so many rows a model before and after the run.")
    max_new_tokens: int = Field(default=48, ge=1, le=4096)
    tolerance_bits_per_byte: float = Field(
        default=0.05, ge=0, description="A version worse than the last one by more than this is kept but not promoted."
    )


class RunCreate(SettingsModel):
    """A training job. Paths are the worker's: a folder it can read, or a Hugging Face hub name."""

    name: Name
    strategy: Strategy
    rounds: int = Field(ge=1, le=10_000)
    llm: str | None = Field(
        default=None,
        max_length=1024,
        description="Folder or hub name; for strategies that train it, or distil from it.",
    )
    slm: str | None = Field(
        default=None,
        max_length=1024,
        description="Folder or hub name of the small model that every device has. For strategies that share an adapter "
        "of it: `fed_lora`, `fedcollm`.",
    )
    public_data: str | None = Field(default=None, max_length=1024, description="JSONL file of public rows.")
    evaluation_data: str | None = Field(
        default=None,
        max_length=1024,
        description="JSONL file on which the LLM and the proxy are tested; only with `public_data`.",
    )
    llm_loading: ModelLoading = ModelLoading()
    probe_rows: int = Field(default=64, ge=1, le=100_000, description="Public rows that every device receives (Q).")
    proxy: ProxySettings = ProxySettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    min_updates: int = Field(default=1, ge=1, description="A round is aggregated only with so many updates.")
    max_updates: int | None = Field(
        default=None, ge=1, le=1_000_000, description="No more devices than this work on a round."
    )
    grace_seconds: float = Field(
        default=30.0, ge=0, le=31_536_000, description="Wait for stragglers after `min_updates` came."
    )
    round_deadline_seconds: float = Field(
        default=3600.0, gt=0, le=31_536_000, description="From the round's opening to its closing."
    )
    sampling_deadline_seconds: float | None = Field(
        default=None,
        gt=0,
        le=31_536_000,
        description="From the round's opening until `min_updates` devices must have taken it. Default: no such limit.",
    )
    too_few_devices: Literal["fail", "pause"] = Field(
        default="fail", description="What becomes of the run when they have not."
    )
    late_updates: Literal["discard", "keep", "next_round"] = Field(
        default="discard",
        description="An update that comes after its round has closed is refused, stored and not used, or used once, by "
        "the next round that closes.",
    )
    max_staleness: int = Field(
        default=1, ge=0, le=1000, description="A late update is used if its base is at most so many versions old."
    )
    staleness_exponent: float = Field(
        default=0.5, ge=0, le=100, description="a in (1+k)^-a, by which an update k versions old weighs less."
    )
    device_ids: list[str] | None = Field(default=None, description="Only these devices; default: all registered.")
    federation: FederationName = Field(default=DEFAULT_FEDERATION, description="Only its devices take part.")
    licence: str | None = Field(
        default=None,
        max_length=64,
        description="For the model card: the licence under which the adapters are passed on.",
    )
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _consistent(self) -> "RunCreate":
        spec = spec_of(self.strategy)
        if not spec.deployable:
            raise ValueError(
                f"strategy `{spec.name}` {spec.not_deployable_because}: it exists in simulations and cannot be deployed"
            )
        needed = {
            "llm": spec.needs_llm,
            "slm": spec.small_model is SmallModel.DEVICES_OWN,
            "public_data": spec.public_set is not PublicSet.NOWHERE,
        }
        if any(needs and not getattr(self, name) for name, needs in needed.items()):
            names = " and ".join(f"`{name}`" for name, needs in needed.items() if needs)
            raise ValueError(f"strategy `{self.strategy.name}` needs {names}")
        if self.evaluation_data is not None and self.public_data is None:
            # Without public rows the server makes no model that it could test.
            raise ValueError("`evaluation_data` needs `public_data`, got none")
        if self.max_updates is not None and self.max_updates < self.min_updates:
            raise ValueError(f"`max_updates` ({self.max_updates}) is less than `min_updates` ({self.min_updates})")
        sampling = self.sampling_deadline_seconds
        if sampling is not None and sampling >= self.round_deadline_seconds:
            raise ValueError(
                f"`sampling_deadline_seconds` ({sampling:g}) must be less than `round_deadline_seconds` "
                f"({self.round_deadline_seconds:g})"
            )
        return self

    @model_validator(mode="after")
    def _late_updates_can_be_added(self) -> "RunCreate":
        # A delta is added to a later adapter, which means something only while A and B keep their basis.
        averaging = self.strategy.averaging
        if self.late_updates == "next_round" and (averaging is None or averaging.aggregation != "fedavg"):
            raise ValueError(
                "`late_updates` next_round needs a strategy that averages adapters, with `aggregation` fedavg"
            )
        return self


class RunStop(RequestModel):
    """End a run."""

    reason: str = Field(default="stopped by an operator", min_length=1, max_length=400)


class RunPause(RequestModel):
    """Hold a run."""

    reason: str = Field(default="paused by an operator", min_length=1, max_length=400)


class RunRollback(RequestModel):
    """Go on from an earlier version."""

    version: int = Field(ge=0, le=2**31 - 1, description="A promoted version; what came after it is withdrawn.")
    reason: str = Field(default="rolled back by an operator", min_length=1, max_length=400)


class Waiting(ResponseModel):
    """What a run or a round waits for."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)

    what: WaitingFor = Field(alias="for")
    since: Timestamp | None = None
    until: Timestamp | None = Field(
        default=None, description="When the wait ends by itself at the latest: a deadline, or a worker's lease."
    )
    by: str | None = Field(default=None, description="Who paused it.")


class Scores(ResponseModel):
    """Quality of one model on one set of rows."""

    rouge_l: float = Field(description="Mean F-measure, 0-100.")
    exact_match: float = Field(description="Share of answers equal to a reference, lower-cased and trimmed, 0-100.")
    bits_per_byte: float = Field(description="Mean bits a byte of the response, tokenizer-independent.")
    num_rows: int


class Run(ResponseModel):
    """A run as operators see it."""

    run_id: str
    name: str
    status: RunStatus
    status_reason: str | None = Field(default=None, description="Why it is in this status, or what it waits for.")
    waiting: Waiting | None = Field(default=None, description="What it waits for, since when and until when.")
    error_code: ErrorCode | None = None
    config: RunCreate
    current_round: int = Field(description="Number of the newest round; 0 before the first.")
    latest_version: int | None = Field(default=None, description="The newest promoted model version.")
    federation: str = DEFAULT_FEDERATION
    created_at: Timestamp
    finished_at: Timestamp | None = None


class RoundDevice(ResponseModel):
    """One device's share of a round."""

    assignment_id: str
    device_id: str
    device_name: str
    status: AssignmentStatus
    reason: str | None = None
    stage: str | None = Field(default=None, description="What the device does: `domain_tuning`, `mutual_learning`, ...")
    step: int | None = None
    steps: int | None = None
    losses: dict[str, float] = Field(default_factory=dict)
    num_examples: int | None = None
    metrics: dict[str, Any] = Field(default_factory=dict, description="A `DeviceMetrics` once submitted.")
    offered_at: Timestamp
    submitted_at: Timestamp | None = None
    late: bool = Field(default=False, description="It was submitted after the round had closed.")
    used_in_round: int | None = Field(default=None, description="Number of the later round that took it, if one did.")
    staleness: int | None = Field(default=None, description="How many versions old its base was in that round.")


class Round(ResponseModel):
    """A round with the devices that work on it."""

    round_id: str
    run_id: str
    number: int
    attempt: int = Field(default=1, description="2 and more: the round was opened again after it had failed.")
    status: RoundStatus
    status_reason: str | None = None
    waiting: Waiting | None = None
    base_version: int
    devices: list[RoundDevice]
    metrics: dict[str, Any] = Field(default_factory=dict, description="A `RoundMetrics`, growing by stage.")
    opened_at: Timestamp
    deadline_at: Timestamp
    finished_at: Timestamp | None = None


class AlignmentMetrics(ResponseModel):
    """How well two tokenizations of the same text could be aligned (docs/method.md, alignment)."""

    coverage: float = Field(ge=0, le=1, description="Share of response bytes inside aligned spans.")
    class_agreement: float = Field(
        ge=0, le=1, description="Share of spans whose first tokens fall into the same class."
    )
    num_spans: int = Field(ge=0, le=MAX_COUNT)
    skipped_rows: int = Field(
        ge=0, le=MAX_COUNT, description="Rows that could not be aligned and kept only their cross-entropy."
    )


class DeviceMetrics(ResponseModel):
    """The numbers that a device sends with an update."""

    before: Scores | None = Field(default=None, description="The SLM before any tuning; only in the first round.")
    after: Scores | None = Field(default=None, description="The SLM after this round's training, when asked for.")
    losses: dict[str, float] = Field(
        default_factory=dict, description="Mean of the last tenth of the steps, nats a token."
    )
    alignment: AlignmentMetrics | None = None
    seconds_by_stage: dict[str, float] = Field(default_factory=dict)
    peak_memory_bytes: int = Field(default=0, ge=0, le=MAX_COUNT)


class RoundMetrics(ResponseModel):
    """What the server measured in one round. It grows stage by stage; what is not known yet is absent."""

    num_updates: int | None = Field(default=None, description="Updates counted.")
    num_examples: int | None = Field(default=None, description="Private rows behind them: the sum of the weights.")
    update_norms: dict[str, float] = Field(default_factory=dict, description="Device -> L2 norm of its delta.")
    update_ranks: dict[str, int] = Field(
        default_factory=dict, description="Device -> rank of its delta, where it is not the run's."
    )
    late_updates: dict[str, int] = Field(
        default_factory=dict, description="Assignment of a late update that was counted -> how many versions old."
    )
    rejected: dict[str, ErrorCode] = Field(default_factory=dict, description="Device -> why its update was refused.")
    quarantined: dict[str, ErrorCode] = Field(
        default_factory=dict, description="Device -> why its update was kept and not counted."
    )
    alignment: AlignmentMetrics | None = Field(default=None, description="The counted devices' reports together.")
    aggregation_errors: dict[str, float] = Field(
        default_factory=dict,
        description="Exact aggregation only, what re-factoring lost: `relative_error` of the product BA, the "
        "`error_bound` that it cannot exceed, and `update_error`, relative to this round's change of BA.",
    )
    losses: dict[str, float] = Field(default_factory=dict, description="The server's mutual learning, nats a token.")
    teacher_rows: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="`llm`, `proxy`: device -> probe rows on which its logits taught that model."
    )
    validation: dict[str, Scores] = Field(default_factory=dict, description="`llm`, `proxy`: public validation rows.")
    test: dict[str, Scores] = Field(default_factory=dict, description="`llm`, `proxy`: the run's evaluation data.")
    promoted: bool | None = None
    seconds_by_stage: dict[str, float] = Field(default_factory=dict, description="`aggregating`, `co_tuning`, ...")
    peak_memory_bytes: dict[str, int] = Field(
        default_factory=dict, description="Largest resident size of the worker's process until the stage's end."
    )


class VersionStep(ResponseModel):
    """One version on the way from version 0: the round that made it, and how many updates went into it."""

    number: int
    parent: int | None = Field(description="The version that its round started from; null for version 0.")
    round_id: str | None
    round_number: int | None
    attempt: int | None
    num_updates: int
    num_late_updates: int = Field(default=0, description="Of these, how many were trained for an earlier round.")


class ModelVersion(ResponseModel):
    """A published pair of adapters: the proxy's theta and the LLM's omega."""

    run_id: str
    number: int = Field(description="0 is the state before the first round.")
    round_id: str | None
    promoted: bool
    proxy_adapter_sha256: Sha256 | None
    llm_adapter_sha256: Sha256 | None
    num_updates: int
    parent: int | None = Field(default=None, description="The version that its round started from.")
    lineage: list[VersionStep] = Field(
        default_factory=list, description="This version and its ancestors down to version 0; not in lists."
    )
    withdrawn_at: Timestamp | None = Field(default=None, description="When a rollback to an earlier version passed it.")
    withdrawn_reason: str | None = None
    metrics: dict[str, Any] = Field(
        default_factory=dict, description="`validation` and, where measured, `test`: model name -> Scores."
    )
    created_at: Timestamp


class Traffic(ResponseModel):
    """Bytes of bodies that crossed the network for a run, by kind, as the server counted them."""

    up: dict[str, int] = Field(description="Each `PartKind`, and `metrics`.")
    down: dict[str, int] = Field(
        description="`proxy_base`, `model_manifest`, `adapter`, `probe_set`, `llm_vocabulary`, the server's messages "
        "(`llm_logits`, `llm_features`, `candidates`), `assignment`."
    )
