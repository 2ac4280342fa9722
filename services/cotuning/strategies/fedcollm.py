"""FedCoLLM (arXiv 2411.11707): federated LoRA of one small model, and mutual distillation with the LLM on the server.

theta is an adapter of the small model that every device and the server have, omega the LLM's. Devices train theta by
cross-entropy, the server averages it, and takes R steps on its auxiliary set, the public rows, from the average:

    L_g = CE_LLM + lambda T^2 D(sg p_f || p_g)        L_f = CE_SLM + lambda T^2 D(sg p_g || p_f)

both means per response token; what a model is taught by is a constant. The distilled theta is what devices get next.

Ours, where the paper leaves it open or asks for more of the user: LLM and small model may have different tokenizers
(`folding`; with equal ones D is the plain divergence of whole distributions); `sequential` is all steps of the LLM,
then all steps of the small model; AdamW, started anew each round. The paper's secure aggregation is not here.
"""

from collections.abc import Callable
from contextlib import ExitStack

from cotuning.adapters import activate, adapted, adapter_state, lora_config
from cotuning.encoded_rows import EncodedRows
from cotuning.language_model import LanguageModel
from cotuning.mutual_learning import Party, learn_mutually
from cotuning.seeding import derive_seed
from cotuning.shared_rows import SharedRows, share_rows
from cotuning.strategies.fed_lora import tune_shared_adapter
from cotuning.strategies.interface import DeviceInputs, ServerInputs, StrategySteps
from cotuning.strategies.results import DeviceResult, ServerResult
from cotuning.training import draw_batches, row_sizes
from protocol.strategies import FedCoLlmSettings

INTERLEAVED_STAGE = "server_mutual_distillation"
LLM_STAGE = "server_llm_distillation"
SLM_STAGE = "server_slm_distillation"

Learn = Callable[[str, bool, bool], dict[str, float]]
"""Takes the stage's name, whether the LLM learns in it, and whether the small model does."""


class FedCoLlm(StrategySteps[FedCoLlmSettings]):
    """Devices tune the shared adapter, the server averages it and distils between it and the LLM."""

    def device_step(self, given: DeviceInputs) -> DeviceResult:
        """Cross-entropy on the private rows, from the distilled theta."""
        return tune_shared_adapter(given, self.settings)

    def server_step(self, given: ServerInputs) -> ServerResult:
        """R steps on the public rows, from the average theta and the last omega."""
        assert given.llm is not None
        assert given.shared_model is not None
        assert given.shared_adapter is not None
        settings = self.settings
        omega = derive_seed(given.seed, "llm_adapter") if given.llm_adapter is None else given.llm_adapter
        with ExitStack() as stack:
            llm = stack.enter_context(
                adapted(given.llm, lora_config(given.llm, **settings.llm_lora.model_dump()), {"llm": omega})
            )
            slm_config = lora_config(given.shared_model, **settings.slm_lora.model_dump())
            slm = stack.enter_context(adapted(given.shared_model, slm_config, {"shared": given.shared_adapter}))
            if not settings.server.steps:
                return ServerResult(adapter_state(slm, "shared"), adapter_state(llm, "llm"))
            shared = self._shared_rows(llm, slm, given)
            losses = self._distil(self._learner(llm, slm, shared, given))
            return ServerResult(adapter_state(slm, "shared"), adapter_state(llm, "llm"), losses, shared.alignment)

    def _shared_rows(self, llm: LanguageModel, slm: LanguageModel, given: ServerInputs) -> SharedRows:
        server = self.settings.server
        return share_rows(
            EncodedRows(llm, given.public, max_length=server.max_length),
            EncodedRows(slm, given.public, max_length=server.max_length),
            draw_batches(
                row_sizes(given.public),
                batch_size=server.batch_size,
                steps=server.steps,
                seed=derive_seed(given.seed, "rows", given.round_number),
            ),
            min_coverage=self.settings.min_coverage,
        )

    def _distil(self, learn: Learn) -> dict[str, float]:
        if self.settings.server.schedule == "interleaved":
            return learn(INTERLEAVED_STAGE, True, True)
        return learn(LLM_STAGE, True, False) | learn(SLM_STAGE, False, True)

    def _learner(self, llm: LanguageModel, slm: LanguageModel, shared: SharedRows, given: ServerInputs) -> Learn:
        settings, server = self.settings, self.settings.server

        def learn(stage: str, llm_learns: bool, slm_learns: bool) -> dict[str, float]:
            activate(llm, ["llm"], trainable=["llm"] if llm_learns else [])
            activate(slm, ["shared"], trainable=["shared"] if slm_learns else [])
            weight = settings.distillation_weight
            return learn_mutually(
                Party("llm", llm, "llm", server.llm_learning_rate, weight, learns=llm_learns),
                Party("slm", slm, "shared", server.slm_learning_rate, weight, learns=slm_learns),
                shared,
                gradient_clip=server.gradient_clip,
                temperature=settings.temperature,
                divergence=settings.divergence,
                precision=server.precision,
                gradient_checkpointing=server.gradient_checkpointing,
                micro_batch_size=server.micro_batch_size,
                seed=derive_seed(given.seed, stage, given.round_number),
                stage=stage,
                on_progress=given.on_progress,
                checkpoints=given.checkpoints,
            )

        return learn
