"""What is made once, before round 1: the proxy, distilled from the LLM, and the adapters that the first round starts
from. Everything random follows from the run's seed, each part with a name of its own."""

from collections.abc import Sequence
from typing import Literal

from peft import LoraConfig

from cotuning.adapters import AdapterState, fresh_adapter, lora_config
from cotuning.checkpoints import Checkpoints
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.proxy import distil_proxy
from cotuning.proxy_creation import create_proxy
from cotuning.seeding import derive_seed
from cotuning.training import OnProgress
from protocol.proxy_settings import ProxySettings
from protocol.strategies import LoraSettings

_IMPORTANCE_ROWS = 256
"""Public rows on which the importance of heads and neurons is measured."""


def make_proxy(llm: LanguageModel, training: Sequence[Example], settings: ProxySettings, *, seed: int) -> LanguageModel:
    """The proxy before distillation: cut out of the LLM, or fresh; see `create_proxy`.

    Args:
        llm: without adapters; only read.
        training: public rows.
        settings: whose source is not `pretrained`: that one is loaded.
        seed: the run's.

    Raises:
        ValueError: the settings do not fit the LLM, or the source is `pretrained`.
    """
    if settings.source == "pretrained":
        raise ValueError("expected the source prune or config, got pretrained: it is loaded, not made")
    return create_proxy(
        llm,
        source=settings.source,
        layers=settings.layers,
        hidden_size=settings.hidden_size if settings.source == "config" else None,
        head_share=settings.head_share,
        neuron_share=settings.neuron_share,
        examples=training[:_IMPORTANCE_ROWS],
        max_length=settings.max_length,
        seed=derive_seed(seed, "proxy"),
    )


def distil(
    llm: LanguageModel,
    proxy: LanguageModel,
    training: Sequence[Example],
    settings: ProxySettings,
    *,
    seed: int,
    on_progress: OnProgress,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Train all of the proxy towards the LLM on public rows, as the settings say; see `distil_proxy`.

    Args:
        llm: without adapters.
        proxy: changed in place; on the LLM's device.
        training: public rows.
        settings: of the run.
        seed: the run's.
        on_progress: see `training.OnProgress`.
        checkpoints: see `training.train`.

    Returns:
        What was measured at the end, by name.

    Raises:
        TrainingDiverged: a loss or gradient is not finite.
    """
    return distil_proxy(
        llm,
        proxy,
        training,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        distillation_weight=settings.distillation_weight,
        temperature=settings.temperature,
        divergence=settings.divergence,
        jsd_beta=settings.jsd_beta,
        feature_weight=settings.feature_weight,
        relation_weight=settings.relation_weight,
        on_policy_fraction=settings.on_policy_fraction,
        on_policy_tokens=settings.on_policy_tokens,
        max_length=settings.max_length,
        precision=settings.precision,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=derive_seed(seed, "distillation"),
        on_progress=on_progress,
        checkpoints=checkpoints,
    )


def peft_config(lm: LanguageModel, settings: LoraSettings) -> LoraConfig:
    """The peft config of an adapter with these settings on this model."""
    return lora_config(lm, **settings.model_dump())


def first_adapter(
    lm: LanguageModel, settings: LoraSettings, name: Literal["shared_adapter", "llm_adapter"], *, seed: int
) -> AdapterState:
    """theta or omega before round 1: changes nothing until it is trained.

    Args:
        lm: the model it is for, without adapters.
        settings: of the adapter.
        name: which; each has other values.
        seed: the run's.

    Raises:
        ValueError: the model has no such layers.
    """
    return fresh_adapter(lm, peft_config(lm, settings), seed=derive_seed(seed, name))
