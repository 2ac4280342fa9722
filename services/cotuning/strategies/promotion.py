"""Whether devices start from what a round made: the candidate is measured on public rows (METHOD step 6)."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Protocol, TypedDict

from torch import Tensor

from cotuning.adapters import adapted
from cotuning.language_model import LanguageModel
from cotuning.strategies.preparation import peft_config
from protocol.strategies import StrategySettings

LLM, SMALL = "llm", "proxy"
"""Names of the server's models where they are measured; the small one is the proxy, or the devices' own."""

_BATCH_FACTOR = 4
"""Rows evaluated at a time, in training batches: without gradients so many fit where one was trained."""


class Measured(Protocol):
    """Of a model on public validation rows."""

    @property
    def bits_per_byte(self) -> float:
        """Of the responses."""
        ...


@contextmanager
def candidates(
    settings: StrategySettings,
    *,
    llm: LanguageModel | None,
    shared_model: LanguageModel | None,
    shared_adapter: Mapping[str, Tensor] | None,
    llm_adapter: Mapping[str, Tensor] | None,
) -> Iterator[dict[str, LanguageModel]]:
    """Lend the server's models with a round's adapters on, by name; those that the strategy has.

    Args:
        settings: of the strategy.
        llm: without adapters; given back so.
        shared_model: likewise.
        shared_adapter: theta.
        llm_adapter: omega.
    """
    pairs = (
        (LLM, "llm", llm, settings.trained_llm_lora, llm_adapter),
        (SMALL, "shared", shared_model, settings.shared_lora, shared_adapter),
    )
    with ExitStack() as lent:
        models = {}
        for name, adapter, base, lora, state in pairs:
            if base is not None and lora is not None and state is not None:
                models[name] = lent.enter_context(adapted(base, peft_config(base, lora), {adapter: state}))
        yield models


class Reading(TypedDict):
    """Arguments of `evaluation.evaluate`."""

    batch_size: int
    max_length: int


def reading(settings: StrategySettings) -> Reading:
    """How the server's models read rows that they are measured on."""
    training = settings.server_steps or settings.training
    return {"batch_size": _BATCH_FACTOR * training.batch_size, "max_length": training.max_length}


def not_worse(candidate: Mapping[str, Measured], reference: Mapping[str, Measured], tolerance: float) -> bool:
    """Whether no model of `candidate` needs over `tolerance` bits a byte more than the same one of `reference`."""
    return all(scores.bits_per_byte <= reference[name].bits_per_byte + tolerance for name, scores in candidate.items())
