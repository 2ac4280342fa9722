"""Federated LoRA (FedIT): one adapter of one small model, tuned by cross-entropy, averaged."""

from typing import Any

import numpy as np
import pytest
import torch

from cotuning.adapters import AdapterMismatch, AdapterState, add, fresh_adapter, lora_config
from cotuning.evaluation import bits_per_byte
from cotuning.strategies.interface import DeviceInputs, StrategySteps
from cotuning.strategies.registry import steps_of
from protocol.strategies import FedLoraSettings
from tests.cotuning.strategy_inputs import LORA, device_inputs, same, server_inputs, tuned_alone
from tests.cotuning.test_strategies import PRIVATE, PROBE, TRAINING, tuned_loss
from tests.tiny_models import tiny_examples, tiny_language_model

OTHERS = tiny_examples(16, start=40, kind="sum")


class Homogeneous:
    """Devices of one small model, and the adapter that they start from."""

    def __init__(self, name: str = "gpt2") -> None:
        self.slm = tiny_language_model(name)
        self.theta = fresh_adapter(self.slm, lora_config(self.slm, **LORA.model_dump()), seed=1)
        self.steps: StrategySteps[Any] = steps_of(FedLoraSettings(slm_lora=LORA, training=TRAINING))

    def inputs(self, **changes: Any) -> DeviceInputs:
        values: dict[str, Any] = {"private": PRIVATE, "shared_adapter": self.theta}
        return device_inputs(self.slm, **values | changes)


def test_a_device_tunes_the_shared_adapter_and_sends_what_changed() -> None:
    world, stages = Homogeneous(), []
    result = world.steps.device_step(world.inputs(on_progress=lambda stage, *_: stages.append(stage)))
    assert stages == ["shared_tuning"] * TRAINING.steps
    assert (set(result.losses), result.num_examples) == ({"slm_ce"}, len(PRIVATE))
    assert (result.logits, result.domain_adapter, result.alignment) == ({}, None, None)
    trained = add(world.theta, result.delta)
    assert all(torch.allclose(trained[name], result.slm_adapter[name], atol=1e-6) for name in trained)
    assert tuned_loss(world.slm, result.slm_adapter, PRIVATE) < bits_per_byte(world.slm, PRIVATE)
    assert same(result.delta, Homogeneous().steps.device_step(world.inputs()).delta)


def test_local_steps_are_those_of_a_device_alone_that_starts_from_the_same_adapter() -> None:
    world = Homogeneous()
    alone = tuned_alone(device_inputs(world.slm, PRIVATE, slm_adapter=world.theta), TRAINING)
    assert same(world.steps.device_step(world.inputs()).slm_adapter, alone)


def test_a_device_goes_on_from_the_shared_adapter_and_not_from_its_own() -> None:
    world = Homogeneous()
    own = world.steps.device_step(world.inputs()).slm_adapter
    first, second = (world.steps.device_step(world.inputs(slm_adapter=kept, round_number=2)) for kept in (None, own))
    assert same(first.delta, second.delta)


def test_the_server_publishes_the_mean_weighted_by_rows() -> None:
    world = Homogeneous()
    results = [world.steps.device_step(world.inputs(private=rows)) for rows in (PRIVATE, OTHERS[:4])]
    aggregator = world.steps.aggregator(world.theta, None)
    for result in results:
        aggregator.add(result.delta, result.num_examples)
    theta = aggregator.result().adapter
    for name, tensor in theta.items():
        parts = [result.delta[name].double().numpy() for result in results]
        expected = world.theta[name].double().numpy() + np.average(parts, axis=0, weights=[16, 4])
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6, atol=1e-8)
    served = world.steps.server_step(server_inputs(shared_adapter=theta))
    assert same(served.shared_adapter or {}, theta)
    assert served.llm_adapter is None


def test_rounds_lower_every_devices_loss() -> None:
    world = Homogeneous("qwen2")
    theta: AdapterState = world.theta
    before = [bits_per_byte(world.slm, rows) for rows in (PRIVATE, OTHERS)]
    for number in (1, 2, 3):
        aggregator = world.steps.aggregator(theta, None)
        for rows in (PRIVATE, OTHERS):
            result = world.steps.device_step(world.inputs(private=rows, shared_adapter=theta, round_number=number))
            aggregator.add(result.delta, result.num_examples)
        theta = aggregator.result().adapter
    after = [tuned_loss(world.slm, theta, rows) for rows in (PRIVATE, OTHERS)]
    assert all(new < old for new, old in zip(after, before, strict=True))


def test_an_adapter_of_another_model_is_refused() -> None:
    world, other = Homogeneous(), Homogeneous("qwen2")
    with pytest.raises(AdapterMismatch, match="wrong tensor names"):
        world.steps.device_step(world.inputs(shared_adapter=other.theta))


def test_its_devices_send_no_logits() -> None:
    with pytest.raises(ValueError, match="expected a strategy whose devices send logits, got fed_lora"):
        Homogeneous().steps.logits_reader(None, PROBE)
