"""The interface through which worker, agent and simulator run any strategy."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from cotuning.adapters import add
from cotuning.strategies import co_plms, interface, registry
from cotuning.strategies.interface import DeviceInputs, StrategySteps
from cotuning.strategies.registry import StepsNotUsable, steps_of
from protocol.strategies import STRATEGIES, CentralizedSettings, StandaloneSettings, StrategySettings
from protocol.strategies.registry import BUILT_IN
from tests.cotuning.strategy_inputs import LORA, device_inputs, same, server_inputs, tuned_alone
from tests.cotuning.test_strategies import PRIVATE, PROBE, PUBLIC, TRAINING, World, settings
from tests.tiny_models import tiny_examples


def of_proxy(world: World, **changes: Any) -> DeviceInputs:
    return device_inputs(
        world.slm, PRIVATE, shared_model=world.proxy, shared_adapter=world.theta, probe=PROBE, **changes
    )


@pytest.mark.parametrize("spec", BUILT_IN, ids=lambda spec: spec.name)
def test_every_built_in_strategy_has_steps(spec: Any) -> None:
    assert isinstance(steps_of(spec.settings()), StrategySteps)


def test_steps_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("cotuning.strategies.standalone:STAGE", "cotuning.strategies.standalone:Nothing", "builtins:str"):
        broken = replace(STRATEGIES["standalone"], steps=place)
        monkeypatch.setattr(registry, "spec_of", lambda settings, spec=broken: spec)
        with pytest.raises(StepsNotUsable, match=f"standalone: expected {place} to make StrategySteps, got"):
            steps_of(StandaloneSettings())


def test_co_plms_through_the_interface_gives_the_bits_of_its_functions() -> None:
    world, chosen = World(), settings()
    steps = steps_of(chosen)
    result, expected = steps.device_step(of_proxy(world)), world.device()
    assert same(result.delta, expected.delta)
    assert same(result.logits, expected.logits)
    assert same(result.slm_adapter, expected.slm_adapter)
    assert result.losses == expected.losses

    read = steps.logits_reader(world.proxy, PROBE)(result.logits, result.logits_metadata)
    assert torch.equal(read.ids_SK, world.parse(expected).ids_SK)
    aggregator = steps.aggregator(world.theta, None)
    aggregator.add(result.delta, 16.0)
    theta = aggregator.result().adapter
    given = server_inputs(
        llm=world.llm,
        shared_model=world.proxy,
        shared_adapter=theta,
        public=PUBLIC,
        probe=PROBE,
        device_logits=[read],
    )
    served = steps.server_step(given)
    plain = world.server(shared_adapter=theta, device_logits=[world.parse(expected)])
    assert served.shared_adapter is not None
    assert served.llm_adapter is not None
    assert same(served.shared_adapter, plain.shared_adapter or {})
    assert same(served.llm_adapter, plain.llm_adapter or {})


def test_a_lower_rank_is_cut_inside_the_step() -> None:
    world = World()
    chosen = settings(device_ranks="declared", aggregation="exact_svd")
    delta = steps_of(chosen).device_step(of_proxy(world, adapter_rank=1)).delta
    assert {tensor.shape[0] for name, tensor in delta.items() if "lora_A" in name} == {1}


def test_the_server_of_devices_by_themselves_has_nothing() -> None:
    served = steps_of(StandaloneSettings()).server_step(server_inputs())
    assert (served.shared_adapter, served.llm_adapter, served.losses) == (None, None, {})


def test_what_a_strategy_does_not_have_is_refused_by_name() -> None:
    steps = steps_of(StandaloneSettings())
    with pytest.raises(ValueError, match="expected a strategy whose devices send deltas, got standalone"):
        steps.aggregator({}, None)
    with pytest.raises(ValueError, match="expected a strategy whose devices send logits, got standalone"):
        steps.logits_reader(None, PROBE)
    assert not steps.learns_from_logits
    assert steps_of(settings()).learns_from_logits
    off = settings().server.model_copy(update={"device_teacher": "off"})
    assert not steps_of(settings(server=off)).learns_from_logits


def test_the_server_publishes_the_aggregate_where_a_strategy_says_nothing_else() -> None:
    class Echo(StrategySteps[StrategySettings]):
        def device_step(self, given: DeviceInputs) -> Any:
            raise AssertionError("the server's step asks no device")

    world = World()
    theta = add(world.theta, world.theta, scale=0.5)
    given = server_inputs(shared_adapter=theta, llm_adapter=world.theta)
    served = Echo(StandaloneSettings()).server_step(given)
    assert same(served.shared_adapter or {}, theta)
    assert same(served.llm_adapter or {}, world.theta)
    assert co_plms.CoPlms.server_step is not interface.StrategySteps.server_step


def test_centralized_is_one_device_with_everybodys_rows() -> None:
    world, others = World(), tiny_examples(16, start=40, kind="sum")
    chosen = CentralizedSettings(slm_lora=LORA, training=TRAINING)
    stages: list[str] = []
    rows = [*PRIVATE, *others]
    pooled = device_inputs(world.slm, rows, on_progress=lambda stage, *_: stages.append(stage))
    result = steps_of(chosen).device_step(pooled)
    assert (stages, result.num_examples) == (["centralized_tuning"] * TRAINING.steps, 32)
    assert (result.delta, result.logits) == ({}, {})
    assert same(result.slm_adapter, tuned_alone(pooled, TRAINING))
    assert not same(result.slm_adapter, tuned_alone(device_inputs(world.slm, PRIVATE), TRAINING))
