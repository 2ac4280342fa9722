"""The models that a stage of a round works with, as the run's strategy needs them."""

from dataclasses import dataclass

from cotuning.language_model import LanguageModel
from persistence.rounds import RoundContext
from protocol.strategies import spec_of
from worker.stage import Work


@dataclass(frozen=True)
class RoundModels:
    """Base models, without adapters; to be given back so.

    Attributes:
        llm: None where the server does not train it.
        shared_model: the small model whose adapter is shared; None where there is none.
    """

    llm: LanguageModel | None
    shared_model: LanguageModel | None


def load_round_models(work: Work, context: RoundContext) -> RoundModels:
    """Load what the strategy needs and the cache has not. The small model is put where the LLM is.

    Raises:
        DomainError: MODEL_FOLDER_MISSING, INVALID_FIELD; see `ModelCache.llm`.
    """
    config = context.config
    llm = None
    if spec_of(config.strategy).trains_llm:
        assert config.llm is not None
        llm = work.cache.llm(config.llm, config.llm_loading)
    manifest = context.proxy_manifest_sha256
    return RoundModels(llm, work.cache.proxy(manifest) if manifest is not None else None)
