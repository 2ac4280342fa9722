"""Controls: settings that take one cause of a gain away, and nothing else."""

from functools import cache
from typing import Any

import pytest
import torch

from cotuning.adapters import AdapterState, fresh_adapter, lora_config
from cotuning.language_model import LanguageModel
from cotuning.proxy_creation import create_proxy
from cotuning.strategies.interface import DeviceInputs, ServerInputs
from cotuning.strategies.registry import steps_of
from cotuning.strategies.results import DeviceResult, ServerResult
from protocol.strategies import CoPlmsSettings, LocalTraining, LoraSettings, ServerTraining, StandaloneSettings
from tests.tiny_models import tiny_examples, tiny_language_model

PRIVATE, PUBLIC, PROBE = tiny_examples(16), tiny_examples(20, start=100), tiny_examples(6, start=200)
LORA = LoraSettings(rank=2, alpha=4.0)
TRAINING = LocalTraining(steps=4, batch_size=4, learning_rate=1e-2, max_length=64)
SMOOTHED = TRAINING.model_copy(update={"label_smoothing": 0.3})


def co_plms(**changes: Any) -> CoPlmsSettings:
    server = ServerTraining(steps=3, batch_size=4, max_length=64, llm_learning_rate=1e-2)
    how: dict[str, Any] = {"slm_lora": LORA, "proxy_lora": LORA, "llm_lora": LORA, "training": TRAINING}
    return CoPlmsSettings(**how | {"domain_steps": 2, "top_k": 8, "server": server} | changes)


@cache
def models() -> tuple[LanguageModel, LanguageModel, LanguageModel, AdapterState]:
    """An LLM, its proxy, an SLM, and the shared adapter that a round starts from; every step gives them back."""
    llm = tiny_language_model("llama")
    proxy = create_proxy(llm, source="prune", layers=2, seed=0)
    theta = fresh_adapter(proxy, lora_config(proxy, **LORA.model_dump()), seed=1)
    return llm, proxy, tiny_language_model("gpt2"), theta


def device(settings: CoPlmsSettings | StandaloneSettings) -> DeviceResult:
    _, proxy, slm, theta = models()
    given = DeviceInputs(
        slm=slm,
        private=PRIVATE,
        slm_adapter=None,
        round_number=1,
        seed=9,
        on_progress=lambda *_: None,
        shared_model=proxy,
        shared_adapter=theta,
        probe=PROBE,
    )
    return steps_of(settings).device_step(given)


def server(settings: CoPlmsSettings) -> ServerResult:
    llm, proxy, _, theta = models()
    given = ServerInputs(
        round_number=1,
        seed=9,
        on_progress=lambda *_: None,
        llm=llm,
        shared_model=proxy,
        shared_adapter=theta,
        public=PUBLIC,
        probe=PROBE,
    )
    return steps_of(settings).server_step(given)


def same(one: AdapterState | None, other: AdapterState | None) -> bool:
    assert one is not None
    assert other is not None
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_frozen_proxy_teaches_on_a_device_and_learns_nothing_but_the_domain() -> None:
    usual, frozen = device(co_plms()), device(co_plms(freeze_proxy=True))
    assert any(bool(tensor.any()) for tensor in usual.delta.values())
    assert not any(bool(tensor.any()) for tensor in frozen.delta.values())
    assert same(frozen.domain_adapter, usual.domain_adapter)
    untaught = device(co_plms(alpha=0.0))
    assert not same(frozen.slm_adapter, untaught.slm_adapter)


def test_a_frozen_proxy_is_the_same_after_the_server_and_has_taught_the_llm() -> None:
    theta = models()[3]
    usual, frozen, alone = (server(co_plms(**each)) for each in ({}, {"freeze_proxy": True}, {"matching": "ce_only"}))
    assert same(frozen.shared_adapter, theta)
    assert not same(usual.shared_adapter, theta)
    assert not same(frozen.llm_adapter, alone.llm_adapter)


def test_the_llm_on_public_rows_alone_learns_nothing_from_its_proxy() -> None:
    first = server(co_plms(matching="ce_only"))
    other = server(co_plms(matching="ce_only", server=co_plms().server.model_copy(update={"proxy_learning_rate": 0.1})))
    assert same(first.llm_adapter, other.llm_adapter)
    assert not same(first.shared_adapter, other.shared_adapter)


def test_a_device_by_itself_may_smooth_its_labels() -> None:
    plain, smoothed = (device(StandaloneSettings(slm_lora=LORA, training=each)) for each in (TRAINING, SMOOTHED))
    assert not same(plain.slm_adapter, smoothed.slm_adapter)
    # What is reported is smoothed too: a target that is dealt out to all tokens is less likely as a whole.
    assert smoothed.losses["slm_ce"] > plain.losses["slm_ce"]


@pytest.mark.parametrize(
    "changes", [{"freeze_proxy": True, "aggregation": "exact_svd"}, {"training": SMOOTHED}], ids=str
)
def test_controls_that_contradict_the_method_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"freeze_proxy|label_smoothing"):
        co_plms(**changes)
