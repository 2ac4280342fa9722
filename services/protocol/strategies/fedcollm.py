"""FedCoLLM (arXiv 2411.11707): federated LoRA of one small model, which learns from the LLM and teaches it on the
server.
"""

from typing import Literal

from pydantic import Field

from protocol.statuses import PartKind
from protocol.strategies.settings import AveragingSettings, LoraSettings, ServerSteps
from protocol.strategies.spec import DownloadKind, PublicSet, SmallModel, StrategySpec


class MutualDistillation(ServerSteps):
    """What the server trains on its auxiliary set, the public rows: `steps` is the paper's R."""

    slm_learning_rate: float = Field(default=2e-3, gt=0)
    schedule: Literal["interleaved", "sequential"] = Field(
        default="interleaved",
        description="In each step both models learn from each other; or the LLM learns first, for all its steps, and "
        "then the small model for as many from the LLM that came of it.",
    )


class FedCoLlmSettings(AveragingSettings):
    """FedCoLLM: every device has the run's `slm` and tunes one shared adapter of it; the server averages it, distils
    between it and the LLM in both directions, and sends out the distilled one."""

    name: Literal["fedcollm"] = "fedcollm"
    llm_lora: LoraSettings = LoraSettings()
    distillation_weight: float = Field(default=1.0, ge=0, description="lambda in CE + lambda KL, of both models.")
    divergence: Literal["forward_kl", "reverse_kl"] = Field(
        default="forward_kl", description="KL(teacher || student), or KL(student || teacher)."
    )
    temperature: float = Field(default=1.0, gt=0, le=20)
    min_coverage: float = Field(
        default=0.8, ge=0, le=1, description="Of the public rows by LLM and small model; below it the run fails."
    )
    server: MutualDistillation = MutualDistillation()

    @property
    def shared_lora(self) -> LoraSettings:
        """The SLM's."""
        return self.slm_lora

    @property
    def trained_llm_lora(self) -> LoraSettings:
        """omega's."""
        return self.llm_lora

    @property
    def server_steps(self) -> MutualDistillation:
        """R inner steps."""
        return self.server


FEDCOLLM = StrategySpec(
    settings=FedCoLlmSettings,
    steps="cotuning.strategies.fedcollm:FedCoLlm",
    uploads=frozenset({PartKind.ADAPTER_DELTA}),
    downloads=frozenset({DownloadKind.MODEL_MANIFEST, DownloadKind.ADAPTER}),
    small_model=SmallModel.DEVICES_OWN,
    public_set=PublicSet.SERVER,
    trains_llm=True,
)
