"""What tests give to a strategy's steps, and how they compare what comes back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cotuning.adapters import AdapterState
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.strategies.interface import DeviceInputs, DeviceMessage, ServerInputs
from cotuning.strategies.registry import steps_of
from cotuning.strategies.results import DeviceResult, Message
from cotuning.vocabulary import Vocabulary
from protocol.strategies import LocalTraining, LoraSettings, StandaloneSettings

LORA = LoraSettings(rank=2, alpha=4.0)
SEED = 9


def silent(stage: str, step: int, steps: int, losses: Mapping[str, float]) -> None:
    """Nobody is told of progress."""


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two adapters are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def device_inputs(slm: LanguageModel, private: Sequence[Example], **changes: Any) -> DeviceInputs:
    """Of a device's first round."""
    values: dict[str, Any] = {"slm_adapter": None, "round_number": 1, "seed": SEED, "on_progress": silent}
    return DeviceInputs(slm=slm, private=private, **values | changes)


def server_inputs(**changes: Any) -> ServerInputs:
    """Of the first round."""
    values: dict[str, Any] = {"round_number": 1, "seed": SEED, "on_progress": silent}
    return ServerInputs(**values | changes)


def sent(message: Message | None, slm: LanguageModel, *, num_examples: int) -> DeviceMessage:
    """A device's message, as it comes to the server."""
    assert message is not None
    return DeviceMessage(message.tensors, message.metadata, num_examples, Vocabulary.of(slm.tokenizer))


def only_a_message(result: DeviceResult) -> Message:
    """The message of a device that lets nothing else leave but numbers, and no text."""
    assert (result.delta, result.logits, result.logits_metadata) == ({}, {}, {})
    assert result.message is not None
    assert result.message.rows == []
    return result.message


def tuned_alone(given: DeviceInputs, training: LocalTraining, *, lora: LoraSettings = LORA) -> AdapterState:
    """What the standalone baseline makes of the same inputs."""
    return steps_of(StandaloneSettings(slm_lora=lora, training=training)).device_step(given).slm_adapter
