"""What the settings of several strategies have in common, and what the services ask of any strategy's settings.

A service never asks which strategy it has before it: what a strategy needs and lets cross the network says its `spec`,
how it is set say the properties of `StrategySettings`.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from protocol.base import MAX_COUNT, SettingsModel


class LoraSettings(SettingsModel):
    """Low-rank adapters (LoRA, arXiv 2106.09685); the same meaning as in peft."""

    rank: int = Field(default=8, ge=1, le=1024)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = Field(default="all-linear", description="As in peft.")


class Batches(SettingsModel):
    """How many rows a step reads, and how many at a time."""

    batch_size: int = Field(default=16, ge=1, le=4096, description="Rows a step.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Rows of a step in memory at a time, null for all: less memory, more time. Losses and gradients "
        "are those of the whole step.",
    )

    @property
    def rows_at_once(self) -> int:
        """Rows in memory at a time."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


class LocalTraining(Batches):
    """One model's training on one device: optimizer steps are the budget, never seconds."""

    steps: int = Field(default=60, ge=1, le=1_000_000, description="Optimizer steps a round.")
    learning_rate: float = Field(
        default=5e-3, gt=0, description="AdamW, started anew each round: linear warm-up over a tenth of its steps."
    )
    weight_decay: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each target that is dealt evenly to all tokens; not in SAML."
    )
    max_length: int = Field(
        default=256, ge=16, le=131_072, description="Tokens a row; longer rows lose their prompt's head."
    )
    gradient_clip: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Autocast dtype of the forward pass."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Keep less for the backward pass and compute it again: less memory, more time."
    )


class ServerSteps(Batches):
    """What the server trains on public rows, once a round: the LLM's adapter and the shared one."""

    steps: int = Field(default=40, ge=0, le=1_000_000)
    llm_learning_rate: float = Field(default=1e-3, gt=0)
    max_length: int = Field(default=256, ge=16, le=131_072)
    gradient_clip: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = Field(
        default=False, description="As in `training`; of the LLM and the shared small model."
    )
    checkpoint_steps: int = Field(
        default=20, ge=0, description="Steps between two states on the worker's disk; 0: none, a kill costs them all."
    )


class ServerOptimizerSettings(SettingsModel):
    """What the server makes of the mean delta: FedAvg, FedAvgM (arXiv 1909.06335) or FedAdam (arXiv 2003.00295)."""

    name: Literal["sgd", "momentum", "adam"] = "sgd"
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the momentum; for `momentum` and `adam`.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="Decay of the mean square; for `adam`.")
    tau: float = Field(default=1e-3, gt=0, description="Added to the root of the mean square; for `adam`.")


class StrategySettings(SettingsModel):
    """The settings of a strategy: a subclass adds its fields, and `name: Literal[...]` with that value as default.

    The properties are what the services ask of every strategy, beside its fields; what they give here holds for one
    that shares no adapter and has no share of the server's.
    """

    name: str
    slm_lora: LoraSettings = LoraSettings()
    training: LocalTraining = LocalTraining()

    @property
    def slm_steps(self) -> int:
        """Optimizer steps that a device's SLM takes in a round."""
        return self.training.steps

    @property
    def shared_lora(self) -> LoraSettings | None:
        """Of the adapter that crosses the network, theta; None where none does."""
        return None

    @property
    def trained_llm_lora(self) -> LoraSettings | None:
        """Of the LLM's adapter, omega; None where the server does not train the LLM."""
        return None

    @property
    def averaging(self) -> "AveragingSettings | None":
        """How the server makes one adapter of the devices' deltas; None where devices send none."""
        return None

    @property
    def server_steps(self) -> ServerSteps | None:
        """What the server trains after that; None for nothing."""
        return None

    @property
    def least_coverage(self) -> float:
        """An update whose device reports less of its text aligned is not used."""
        return 0.0

    @property
    def kept_classes(self) -> int | None:
        """Classes of each distribution that devices send as logits; None where they send none."""
        return None

    def most_message_bytes(self, probe_set_bytes: int) -> int | None:
        """The most bytes that a device's message can have; None: as many as the server takes of any part.

        Args:
            probe_set_bytes: size of the probe set's JSON Lines file, 0 where devices get none.
        """
        return None

    def assigned_rank(self, declared: int | None) -> int | None:
        """Rank at which a device trains the shared adapter where it is not the run's own; None: the run's.

        Args:
            declared: the most that its profile says it takes.
        """
        return None


class AveragingSettings(StrategySettings):
    """Of a strategy whose devices send the delta of a shared adapter."""

    aggregation: Literal["fedavg", "exact_svd"] = Field(
        default="fedavg",
        description="Mean of A and of B apart, or of the products BA, cut to the rank by singular values.",
    )
    server_optimizer: ServerOptimizerSettings = ServerOptimizerSettings()
    server_learning_rate: float = Field(
        default=1.0,
        gt=0,
        description="eta in theta + eta * mean(delta). `adam` moves a value by at most about eta: 1e-3 to 1e-2.",
    )
    max_examples: int = Field(
        default=100_000, ge=1, le=MAX_COUNT, description="An update weighs at most so many examples, whatever it says."
    )
    max_update_norm: float = Field(default=1e3, gt=0, description="L2 norm over which a delta is refused.")
    norm_gate: Literal["off", "quarantine", "reject"] = Field(
        default="off",
        description="What becomes of an update whose norm is far from the round's others: nothing; kept, not counted "
        "and shown; or refused.",
    )
    norm_gate_deviations: float = Field(
        default=6.0,
        ge=1,
        description="How far from the median is far, in standard deviations as the median absolute deviation tells.",
    )
    norm_gate_min_updates: int = Field(
        default=5, ge=3, description="With fewer updates no distribution can be told, and nothing is held back."
    )

    @property
    def averaging(self) -> "AveragingSettings":
        """These."""
        return self

    @model_validator(mode="after")
    def _products_have_no_momentum(self) -> Self:
        # Re-factoring turns A and B into another basis each round: a mean over rounds of their deltas means nothing.
        if self.aggregation != "fedavg" and self.server_optimizer.name != "sgd":
            name = self.server_optimizer.name
            raise ValueError(f"`aggregation` {self.aggregation} goes with `server_optimizer.name` sgd, got {name}")
        return self
