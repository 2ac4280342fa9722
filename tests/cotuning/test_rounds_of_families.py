"""Rounds of the strategies that exchange messages, run by one loop that knows none of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from cotuning.adapters import AdapterState
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.strategies.interface import DeviceInputs, DeviceMessage, ServerInputs, StrategySteps
from cotuning.strategies.registry import steps_of
from cotuning.strategies.results import DeviceResult, Message, ServerResult
from cotuning.vocabulary import Vocabulary
from protocol.runs import RunCreate
from protocol.statuses import PartKind
from protocol.strategies import (
    STRATEGIES,
    DataBasedSettings,
    FeatureBasedSettings,
    FedMktSettings,
    LocalTraining,
    MessageKind,
    ServerSteps,
    StrategySettings,
)
from tests.cotuning.strategy_inputs import LORA, device_inputs, same, sent, server_inputs
from tests.tiny_models import tiny_examples, tiny_language_model

COMMON: dict[str, Any] = {
    "slm_lora": LORA,
    "llm_lora": LORA,
    "training": LocalTraining(steps=3, batch_size=4, learning_rate=1e-2, max_length=64),
    "server": ServerSteps(steps=3, batch_size=4, max_length=96),
}
FAMILIES: list[StrategySettings] = [
    FedMktSettings(transfer_rows="all", transfer_steps=2, **COMMON),
    DataBasedSettings(candidates=4, max_new_tokens=8, **COMMON),
    FeatureBasedSettings(feature_size=4, **COMMON),
]
SLMS = ("gpt2", "qwen2")
PUBLIC, PROBE = tiny_examples(6, start=100), tiny_examples(6, start=200)


@dataclass
class Federation:
    """Two devices with unlike SLMs, and a server."""

    steps: StrategySteps[Any]
    llm: LanguageModel = field(default_factory=lambda: tiny_language_model("llama"))
    omega: AdapterState | None = None
    message: Message | None = None
    state: AdapterState = field(default_factory=dict)
    psi: list[AdapterState | None] = field(default_factory=lambda: [None, None])

    def device(self, place: int, round_number: int) -> DeviceInputs:
        private: Sequence[Example] = tiny_examples(8, start=10 * place)
        return device_inputs(
            tiny_language_model(SLMS[place]),
            private,
            slm_adapter=self.psi[place],
            round_number=round_number,
            probe=PROBE,
            message=self.message,
            llm_vocabulary=Vocabulary.of(self.llm.tokenizer),
        )

    def server(self, round_number: int, messages: Sequence[DeviceMessage]) -> ServerInputs:
        return server_inputs(
            round_number=round_number,
            llm=self.llm,
            llm_adapter=self.omega,
            public=PUBLIC,
            probe=PROBE,
            device_messages=messages,
            message=self.message,
            state=self.state,
        )

    def round(self, number: int) -> tuple[list[DeviceResult], ServerResult]:
        if number == 1:
            self.message = self.steps.first_message(self.server(0, []))
        results = [self.steps.device_step(self.device(place, number)) for place in range(2)]
        self.psi = [result.slm_adapter for result in results]
        messages = [
            sent(result.message, tiny_language_model(SLMS[place]), num_examples=result.num_examples)
            for place, result in enumerate(results)
            if result.message is not None
        ]
        served = self.steps.server_step(self.server(number, messages))
        self.omega, self.message, self.state = served.llm_adapter, served.message, dict(served.state)
        return results, served


@pytest.mark.parametrize("settings", FAMILIES, ids=lambda settings: settings.name)
def test_rounds_through_the_interface(settings: StrategySettings) -> None:
    federations = [Federation(steps_of(settings)) for _ in range(2)]
    adapters: list[AdapterState] = []
    for number in (1, 2, 3):
        (results, served), (again, _) = (each.round(number) for each in federations)
        for result, other in zip(results, again, strict=True):
            assert same(result.slm_adapter, other.slm_adapter)
            assert (result.delta, result.logits, result.domain_adapter) == ({}, {}, None)
            assert result.num_examples == 8
            if result.message is not None:
                assert result.message.rows == []  # no text leaves a device
        assert served.shared_adapter is None
        assert served.message is not None
        assert served.llm_adapter is not None
        adapters.append(served.llm_adapter)
    assert not same(adapters[0], adapters[1])
    assert not same(adapters[1], adapters[2])
    last = federations[0].steps.last_step(federations[0].device(0, 4))
    assert (last is not None) == STRATEGIES[settings.name].last_step == (settings.name == "fedmkt")
    assert last is None or last.message is None


def test_what_the_families_let_cross_the_network() -> None:
    sent = {name: (spec.uploads, spec.messages_up, spec.messages_down) for name, spec in STRATEGIES.items()}
    assert sent["fedmkt"] == ({PartKind.SLM_VOCABULARY}, {MessageKind.SLM_LOGITS}, {MessageKind.LLM_LOGITS})
    assert sent["data_based"] == (frozenset(), {MessageKind.COUNTS}, {MessageKind.CANDIDATES})
    assert sent["feature_based"] == (frozenset(), {MessageKind.SLM_FEATURES}, {MessageKind.LLM_FEATURES})
    for settings in FAMILIES:
        spec = STRATEGIES[settings.name]
        assert spec.deployable
        assert spec.parts - spec.uploads == {spec.sent_message} == spec.messages_up
        RunCreate(name="x", strategy=settings, rounds=1, llm="llm", public_data="public.jsonl", min_updates=1)


@pytest.mark.parametrize("settings", FAMILIES, ids=lambda settings: settings.name)
def test_each_message_is_checked_by_itself(settings: StrategySettings) -> None:
    """Without models: what is refused costs its device the round, and nobody else."""
    federation = Federation(steps_of(settings))
    federation.round(1)
    given = replace(federation.server(2, []), llm=None)
    for place in range(2):
        message = federation.steps.device_step(federation.device(place, 2)).message
        if message is None:  # this LLM wrote no candidates
            continue
        honest = sent(message, tiny_language_model(SLMS[place]), num_examples=8)
        federation.steps.check_message(honest, given)
        longer = {name: torch.cat([tensor, tensor]) for name, tensor in message.tensors.items()}
        with pytest.raises(ValueError, match="expected"):
            federation.steps.check_message(replace(honest, tensors=longer), given)
    strange = DeviceMessage({"weights": torch.zeros(1)}, {}, 8, Vocabulary.of(tiny_language_model("gpt2").tokenizer))
    with pytest.raises(ValueError, match="expected"):
        federation.steps.check_message(strange, given)


@pytest.mark.parametrize("settings", FAMILIES[1:], ids=lambda settings: settings.name)
def test_a_message_of_other_tensors_is_refused(settings: StrategySettings) -> None:
    federation = Federation(steps_of(settings))
    federation.round(1)
    vocabulary = Vocabulary.of(tiny_language_model("gpt2").tokenizer)
    strange = DeviceMessage({"weights": torch.zeros(1)}, {}, 8, vocabulary)
    with pytest.raises(ValueError, match=r"expected a message of the tensor '\w+' alone, got \['weights'\]"):
        federation.steps.server_step(federation.server(2, [strange]))
