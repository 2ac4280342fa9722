"""Data-based co-tuning: the LLM writes candidate examples, devices keep what fits and say only how many."""

from typing import Literal, Self

from pydantic import Field, model_validator

from protocol.part_sizes import MOST_COUNTS_BYTES
from protocol.strategies.settings import LoraSettings, ServerSteps, StrategySettings
from protocol.strategies.spec import MessageKind, PublicSet, StrategySpec


class DataBasedSettings(StrategySettings):
    """Data-based: the LLM's candidates, from public seeds, are training rows of the devices that they fit."""

    name: Literal["data_based"] = "data_based"
    llm_lora: LoraSettings = LoraSettings()
    candidates: int = Field(default=64, ge=1, le=100_000, description="That the LLM tries to write a round.")
    shots: int = Field(default=3, ge=1, le=64, description="Public examples in each prompt, the seed among them.")
    max_new_tokens: int = Field(default=128, ge=1, le=4096, description="Of a candidate.")
    sampling_temperature: float = Field(default=0.8, gt=0, le=20)
    keep: Literal["quantiles", "below_private"] = Field(
        default="quantiles",
        description="Which candidates a device keeps, by its SLM's loss per token: those between two quantiles of the "
        "candidates' losses; or those at most `margin` above the median of its private rows' losses.",
    )
    low_quantile: float = Field(default=0.1, ge=0, le=1, description="For `quantiles`: below it nothing new is learnt.")
    high_quantile: float = Field(default=0.6, ge=0, le=1, description="For `quantiles`: above it nothing fits.")
    margin: float = Field(default=0.0, ge=-1000, le=1000, description="For `below_private`, nats a token.")
    candidate_fraction: float = Field(
        default=0.25, ge=0, lt=1, description="Share of a device's batches drawn from the candidates that it kept."
    )
    count_by: Literal["seed", "task"] = Field(
        default="seed", description="What devices count by; a task has more seeds, so its counts say less."
    )
    smoothing: float = Field(
        default=1.0, gt=0, le=1e6, description="Candidates of each group counted as kept, and as many as not, at first."
    )
    server: ServerSteps = Field(
        default=ServerSteps(), description="Of public rows, before the LLM writes; 0 steps: it writes as it is."
    )

    @property
    def trained_llm_lora(self) -> LoraSettings:
        """omega's."""
        return self.llm_lora

    @property
    def server_steps(self) -> ServerSteps:
        """The LLM learns the form of the public rows."""
        return self.server

    def most_message_bytes(self, probe_set_bytes: int) -> int:
        """A count a group; how many groups there are depends on the public rows, which devices do not get."""
        return MOST_COUNTS_BYTES

    @model_validator(mode="after")
    def _quantiles_in_order(self) -> Self:
        if self.low_quantile > self.high_quantile:
            raise ValueError(
                f"expected `low_quantile` at most `high_quantile`, got {self.low_quantile:g} and {self.high_quantile:g}"
            )
        return self


DATA_BASED = StrategySpec(
    settings=DataBasedSettings,
    steps="cotuning.strategies.data_based:DataBased",
    messages_up=frozenset({MessageKind.COUNTS}),
    messages_down=frozenset({MessageKind.CANDIDATES}),
    public_set=PublicSet.SERVER,
    trains_llm=True,
)
