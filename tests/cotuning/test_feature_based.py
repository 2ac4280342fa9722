import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cotuning.adapters import AdapterState
from cotuning.examples import Example
from cotuning.language_model import LanguageModel
from cotuning.pooled_features import DeviceFeatures, FeaturesRefused, mean_features
from cotuning.strategies.feature_based import FeatureBased
from cotuning.strategies.results import DeviceResult, Message, ServerResult, only_tensor
from protocol.strategies import FeatureBasedSettings, LocalTraining, ServerSteps
from tests.cotuning.strategy_inputs import (
    LORA,
    SEED,
    device_inputs,
    only_a_message,
    same,
    sent,
    server_inputs,
    tuned_alone,
)
from tests.tiny_models import tiny_examples, tiny_language_model

PRIVATE = tiny_examples(12)
PUBLIC = tiny_examples(8, start=100)
PROBE = tiny_examples(10, start=200)
TRAINING = LocalTraining(steps=6, batch_size=4, learning_rate=1e-2, max_length=64)


def settings(**changes: Any) -> FeatureBasedSettings:
    values: dict[str, Any] = {
        "slm_lora": LORA,
        "llm_lora": LORA,
        "training": TRAINING,
        "feature_size": 5,
        "probe_batch_size": 4,
        "server": ServerSteps(steps=6, batch_size=4, max_length=64, llm_learning_rate=1e-2),
    }
    return FeatureBasedSettings(**values | changes)


def first_features(seed: int = SEED) -> Tensor:
    given = server_inputs(llm=tiny_language_model("llama"), probe=PROBE, seed=seed)
    message = FeatureBased(settings()).first_message(given)
    assert message is not None
    return only_tensor(message.tensors, "features")


def device(
    slm: LanguageModel | None = None,
    *,
    chosen: FeatureBasedSettings | None = None,
    features: Tensor | None = None,
    private: Sequence[Example] = PRIVATE,
    **changes: Any,
) -> DeviceResult:
    message = Message({"features": first_features() if features is None else features})
    values: dict[str, Any] = {"probe": PROBE, "message": message}
    given = device_inputs(slm or tiny_language_model("gpt2"), private, **values | changes)
    return FeatureBased(chosen or settings()).device_step(given)


def server(devices: Sequence[DeviceResult] = (), chosen: FeatureBasedSettings | None = None) -> ServerResult:
    slm = tiny_language_model("gpt2")
    given = server_inputs(
        llm=tiny_language_model("llama"),
        public=PUBLIC,
        probe=PROBE,
        device_messages=[sent(each.message, slm, num_examples=each.num_examples) for each in devices],
    )
    return FeatureBased(chosen or settings()).server_step(given)


def features_of(result: DeviceResult | ServerResult) -> Tensor:
    assert result.message is not None
    return only_tensor(result.message.tensors, "features")


def omega(result: ServerResult) -> AdapterState:
    assert result.llm_adapter is not None
    return result.llm_adapter


@pytest.mark.parametrize("distance", ["cosine", "mse"])
@pytest.mark.parametrize("slm", ["gpt2", "bloom", "llama_proxy"])
def test_a_round_with_devices_of_every_width(slm: str, distance: str) -> None:
    chosen = settings(distance=distance)
    result = device(tiny_language_model(slm), chosen=chosen)
    assert (features_of(result).dtype, features_of(result).shape) == (torch.float16, (10, 5))
    assert set(result.losses) == {"slm_ce", "slm_feature"}
    served = server([result], chosen)
    assert set(served.losses) == {"llm_ce", "llm_feature"}
    features = features_of(served)
    assert (features.dtype, features.shape) == (torch.float16, (10, 5))
    changes = {"features": features, "slm_adapter": result.slm_adapter, "round_number": 2}
    second = device(tiny_language_model(slm), chosen=chosen, **changes)
    assert not same(second.slm_adapter, result.slm_adapter)


def test_the_servers_features_are_centred_of_unit_size_and_a_linear_map_of_the_states() -> None:
    features = first_features().float()
    torch.testing.assert_close(features.mean(0), torch.zeros(5), atol=1e-3, rtol=0)
    assert float(features.square().mean()) == pytest.approx(1.0, rel=1e-2)
    assert torch.equal(features, first_features().float())
    assert not torch.equal(first_features(seed=10).float(), features)


def test_features_come_closer_by_the_term() -> None:
    """With its weight the distance falls below what the cross-entropy alone leaves."""
    target = first_features().float()
    long = TRAINING.model_copy(update={"steps": 60})
    distances = []
    for weight in (0.0, 10.0):
        features = features_of(device(chosen=settings(feature_weight=weight, training=long))).float()
        distances.append(float((1 - torch.cosine_similarity(features, target, dim=1)).mean()))
    assert distances[1] < 0.8 * distances[0]


def test_without_weight_a_device_is_the_standalone_baseline_bit_for_bit() -> None:
    alone = tuned_alone(device_inputs(tiny_language_model("gpt2"), PRIVATE), TRAINING)
    without = device(chosen=settings(feature_weight=0.0))
    assert same(without.slm_adapter, alone)
    assert set(without.losses) == {"slm_ce"}
    assert not same(device().slm_adapter, alone)


def test_without_weight_or_devices_the_server_learns_public_rows_alone() -> None:
    devices = [device()]
    plain = server()
    without = server(devices, settings(feature_weight=0.0))
    assert same(omega(plain), omega(without))
    assert set(plain.losses) == {"llm_ce"}
    assert not same(omega(server(devices)), omega(plain))
    still = server(devices, settings(server=ServerSteps(steps=0, max_length=64)))
    assert torch.equal(features_of(still), first_features())
    assert still.losses == {}


def test_the_mean_of_the_devices_by_hand() -> None:
    devices = [DeviceFeatures(torch.full((2, 2), 1.0), 1), DeviceFeatures(torch.tensor([[5.0, 9.0], [1.0, 1.0]]), 3)]
    assert mean_features(devices, max_examples=100).tolist() == [[4.0, 7.0], [1.0, 1.0]]
    assert mean_features(devices, max_examples=1).tolist() == [[3.0, 5.0], [1.0, 1.0]]
    assert torch.equal(mean_features(devices[::-1], max_examples=100), mean_features(devices, max_examples=100))
    with pytest.raises(ValueError, match=r"got weights \[\]"):
        mean_features([], max_examples=1)
    with pytest.raises(ValueError, match=r"got weights \[1, 0\]"):
        mean_features([devices[0], DeviceFeatures(torch.zeros(2, 2), 0)], max_examples=100)


def test_the_order_of_the_devices_changes_rounding_only() -> None:
    devices = [device(tiny_language_model(name)) for name in ("gpt2", "bloom", "opt")]
    one, other = omega(server(devices)), omega(server(devices[::-1]))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-3)


def test_equal_arguments_give_equal_bits_and_models_come_back_as_they_went() -> None:
    slm = tiny_language_model("gpt2")
    weights = {name: tensor.clone() for name, tensor in slm.model.state_dict().items()}
    generator = torch.get_rng_state()
    first, again, other = (device(slm, seed=seed) for seed in (9, 9, 10))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in slm.model.state_dict().items())
    assert same(first.slm_adapter, again.slm_adapter)
    assert torch.equal(features_of(first), features_of(again))
    assert not same(first.slm_adapter, other.slm_adapter)


def test_rows_in_memory_at_a_time_change_rounding_only() -> None:
    whole = device()
    parts = device(chosen=settings(training=TRAINING.model_copy(update={"micro_batch_size": 3})))
    for name, tensor in whole.slm_adapter.items():
        torch.testing.assert_close(parts.slm_adapter[name], tensor, atol=1e-4, rtol=1e-3)


def test_what_leaves_is_features_and_numbers() -> None:
    for count in (4, 12):
        result = device(private=tiny_examples(count))
        message = only_a_message(result)
        assert (message.tensors.keys(), message.metadata) == ({"features"}, {})
        assert message.tensors["features"].shape == (10, 5)  # whatever the private rows are
        assert set(result.losses) == {"slm_ce", "slm_feature"}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(10, 5), r"float16 \[10, 5\], got torch.float32 \[10, 5\]"),
        (torch.zeros(9, 5).half(), r"float16 \[10, 5\], got torch.float16 \[9, 5\]"),
        (torch.zeros(10, 6).half(), r"float16 \[10, 5\], got torch.float16 \[10, 6\]"),
        (torch.full((10, 5), math.inf).half(), "row 0 has one that is not"),
        (torch.full((10, 5), math.nan).half(), "row 0 has one that is not"),
    ],
    ids=["type", "rows", "size", "infinite", "no_number"],
)
def test_features_that_were_not_asked_for_so_are_refused(features: Tensor, message: str) -> None:
    with pytest.raises(FeaturesRefused, match=message):
        device(features=features)


def test_an_empty_probe_set_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one probe row, got none"):
        device(probe=[], features=torch.zeros(0, 5).half())
