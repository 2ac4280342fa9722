"""FedMKT (arXiv 2406.02224): logits on public rows, both ways, and only where they help."""

from typing import Literal

from pydantic import Field

from protocol.part_sizes import most_logits_bytes
from protocol.statuses import PartKind
from protocol.strategies.settings import LocalTraining, LoraSettings, ServerSteps, StrategySettings
from protocol.strategies.spec import DownloadKind, MessageKind, PublicSet, StrategySpec

_PAPER_LORA = LoraSettings(rank=8, alpha=16.0, dropout=0.05)


class FedMktSettings(StrategySettings):
    """FedMKT: devices and server teach each other by logits on the probe set, row by row, where they do better."""

    name: Literal["fedmkt"] = "fedmkt"
    slm_lora: LoraSettings = _PAPER_LORA
    llm_lora: LoraSettings = _PAPER_LORA
    training: LocalTraining = Field(default=LocalTraining(batch_size=4), description="Of private rows, on the device.")
    transfer_steps: int = Field(
        default=20, ge=0, le=1_000_000, description="Steps by which a device's SLM learns from the LLM's logits."
    )
    ce_weight: float = Field(
        default=0.9, ge=0, le=1, description="lambda in `lambda CE + (1 - lambda) CE(teacher)`, on both sides."
    )
    adam_beta2: float = Field(default=0.95, gt=0, lt=1, description="AdamW's second beta, in all training here.")
    token_alignment: Literal["mined_dtw", "fold"] = Field(
        default="mined_dtw",
        description="How a reader aligns another tokenizer's logits: least edit distance and DTW as published, or "
        "distributions folded onto common classes.",
    )
    selection_unit: Literal["token", "byte"] = Field(
        default="token",
        description="What a row's losses are compared by: the mean per answer token, as published; or per answer byte, "
        "which favours no tokenizer.",
    )
    losses: Literal["sent", "computed"] = Field(
        default="sent",
        description="Whose word on a teacher's losses counts: its own, as published, as far as its distributions allow "
        "it; or nobody's, they are computed from the distributions that it sent.",
    )
    transfer_rows: Literal["kept", "all"] = Field(
        default="kept",
        description="Probe rows that are trained on: those that somebody teaches, or all, the others by their "
        "cross-entropy alone.",
    )
    top_k: int = Field(default=32, ge=1, le=1024, description="Token ids kept of each probe distribution.")
    temperature: float = Field(default=1.0, gt=0, le=20)
    logits_values: Literal["int7", "int8", "float16"] = Field(
        default="float16", description="How log-probabilities travel."
    )
    min_coverage: float = Field(
        default=0.8, ge=0, le=1, description="For `fold`: below it nothing is learnt, alignment did not work."
    )
    server: ServerSteps = Field(default=ServerSteps(batch_size=4), description="Of probe rows; `max_length` of all.")

    @property
    def slm_steps(self) -> int:
        """On private rows, and from the LLM's logits."""
        return self.training.steps + self.transfer_steps

    @property
    def trained_llm_lora(self) -> LoraSettings:
        """omega's."""
        return self.llm_lora

    @property
    def server_steps(self) -> ServerSteps:
        """The LLM learns from devices."""
        return self.server

    @property
    def least_coverage(self) -> float:
        """Only what `fold` aligns has a coverage."""
        return self.min_coverage if self.token_alignment == "fold" else 0.0

    def most_message_bytes(self, probe_set_bytes: int) -> int:
        """Logits, and a loss a row."""
        return most_logits_bytes(probe_set_bytes, self.top_k)


FEDMKT = StrategySpec(
    settings=FedMktSettings,
    steps="cotuning.strategies.fedmkt:FedMkt",
    uploads=frozenset({PartKind.SLM_VOCABULARY}),
    downloads=frozenset({DownloadKind.PROBE_SET, DownloadKind.LLM_VOCABULARY}),
    messages_up=frozenset({MessageKind.SLM_LOGITS}),
    messages_down=frozenset({MessageKind.LLM_LOGITS}),
    public_set=PublicSet.SERVER_AND_DEVICES,
    trains_llm=True,
    last_step=True,
)
