import math
from typing import Any

import pytest
import torch

from cotuning.adapters import AdapterState
from cotuning.pooled_features import DeviceFeatures, FeaturesRefused, check_features, mean_features
from cotuning.strategies import feature_based, standalone
from protocol.strategies import FeatureBasedSettings, LocalTraining, LoraSettings, ServerSteps, StandaloneSettings
from tests.tiny_models import tiny_examples, tiny_language_model

PRIVATE = tiny_examples(12)
PUBLIC = tiny_examples(8, start=100)
PROBE = tiny_examples(10, start=200)
LORA = LoraSettings(rank=2, alpha=4.0)
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


def silent(stage: str, step: int, steps: int, losses: dict[str, float]) -> None:
    pass


def first_features(**changes: Any) -> torch.Tensor:
    return feature_based.initial_features(
        llm=tiny_language_model("llama"), probe=PROBE, llm_adapter=None, settings=settings(**changes), seed=9
    )


def device(name: str = "gpt2", **changes: Any) -> feature_based.FeatureDeviceResult:
    values: dict[str, Any] = {
        "slm": tiny_language_model(name),
        "private": PRIVATE,
        "probe": PROBE,
        "server_features": first_features(),
        "slm_adapter": None,
        "settings": settings(),
        "round_number": 1,
        "seed": 9,
        "on_progress": silent,
    }
    return feature_based.device_step(**values | changes)


def server(**changes: Any) -> feature_based.FeatureServerResult:
    values: dict[str, Any] = {
        "llm": tiny_language_model("llama"),
        "public": PUBLIC,
        "probe": PROBE,
        "llm_adapter": None,
        "device_features": [],
        "settings": settings(),
        "round_number": 1,
        "seed": 9,
        "on_progress": silent,
    }
    return feature_based.server_step(**values | changes)


def received(result: feature_based.FeatureDeviceResult) -> DeviceFeatures:
    features_NE = check_features(result.features, num_rows=len(PROBE), feature_size=5)
    return DeviceFeatures(features_NE, result.num_examples)


def same(a: AdapterState, b: AdapterState) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("distance", ["cosine", "mse"])
@pytest.mark.parametrize("slm", ["gpt2", "bloom", "llama_proxy"])
def test_a_round_with_devices_of_every_width(slm: str, distance: str) -> None:
    chosen = settings(distance=distance)
    result = device(slm, settings=chosen)
    assert (result.features.dtype, result.features.shape) == (torch.float16, (10, 5))
    assert set(result.losses) == {"slm_ce", "slm_feature"}
    served = server(device_features=[received(result)], settings=chosen)
    assert set(served.losses) == {"llm_ce", "llm_feature"}
    assert (served.features.dtype, served.features.shape) == (torch.float16, (10, 5))
    second = device(
        slm, settings=chosen, server_features=served.features, slm_adapter=result.slm_adapter, round_number=2
    )
    assert not same(second.slm_adapter, result.slm_adapter)


def test_the_servers_features_are_centred_of_unit_size_and_a_linear_map_of_the_states() -> None:
    features = first_features().float()
    torch.testing.assert_close(features.mean(0), torch.zeros(5), atol=1e-3, rtol=0)
    assert float(features.square().mean()) == pytest.approx(1.0, rel=1e-2)
    assert torch.equal(features, first_features().float())
    other = feature_based.initial_features(
        llm=tiny_language_model("llama"), probe=PROBE, llm_adapter=None, settings=settings(), seed=10
    )
    assert not torch.equal(other.float(), features)


def test_features_come_closer_by_the_term() -> None:
    """With its weight the distance falls below what the cross-entropy alone leaves."""
    target = first_features().float()
    long = TRAINING.model_copy(update={"steps": 60})
    distances = []
    for weight in (0.0, 10.0):
        result = device(settings=settings(feature_weight=weight, training=long))
        distances.append(float((1 - torch.cosine_similarity(result.features.float(), target, dim=1)).mean()))
    assert distances[1] < 0.8 * distances[0]


def test_without_weight_a_device_is_the_standalone_baseline_bit_for_bit() -> None:
    alone = standalone.device_step(
        slm=tiny_language_model("gpt2"),
        private=PRIVATE,
        slm_adapter=None,
        settings=StandaloneSettings(slm_lora=LORA, training=TRAINING),
        round_number=1,
        seed=9,
        on_progress=silent,
    )
    without = device(settings=settings(feature_weight=0.0))
    assert same(without.slm_adapter, alone.slm_adapter)
    assert set(without.losses) == {"slm_ce"}
    assert not same(device().slm_adapter, alone.slm_adapter)


def test_without_weight_or_devices_the_server_learns_public_rows_alone() -> None:
    features = [received(device())]
    plain = server()
    without = server(device_features=features, settings=settings(feature_weight=0.0))
    assert same(plain.llm_adapter, without.llm_adapter)
    assert set(plain.losses) == {"llm_ce"}
    assert not same(server(device_features=features).llm_adapter, plain.llm_adapter)
    still = server(device_features=features, settings=settings(server=ServerSteps(steps=0, max_length=64)))
    assert torch.equal(still.features, first_features())
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
    devices = [received(device(name)) for name in ("gpt2", "bloom", "opt")]
    one, other = server(device_features=devices), server(device_features=devices[::-1])
    for name, tensor in one.llm_adapter.items():
        torch.testing.assert_close(other.llm_adapter[name], tensor, atol=1e-5, rtol=1e-3)


def test_equal_arguments_give_equal_bits_and_models_come_back_as_they_went() -> None:
    slm = tiny_language_model("gpt2")
    weights = {name: tensor.clone() for name, tensor in slm.model.state_dict().items()}
    generator = torch.get_rng_state()
    first, again, other = (device(slm=slm, seed=seed) for seed in (9, 9, 10))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in slm.model.state_dict().items())
    assert same(first.slm_adapter, again.slm_adapter)
    assert torch.equal(first.features, again.features)
    assert not same(first.slm_adapter, other.slm_adapter)


def test_rows_in_memory_at_a_time_change_rounding_only() -> None:
    whole = device()
    parts = device(settings=settings(training=TRAINING.model_copy(update={"micro_batch_size": 3})))
    for name, tensor in whole.slm_adapter.items():
        torch.testing.assert_close(parts.slm_adapter[name], tensor, atol=1e-4, rtol=1e-3)


def test_what_leaves_is_features_and_numbers() -> None:
    assert set(feature_based.FeatureDeviceResult.__dataclass_fields__) == {
        "slm_adapter",
        "features",
        "num_examples",
        "losses",
    }
    shapes = {device(private=tiny_examples(count)).features.shape for count in (4, 12)}
    assert shapes == {(10, 5)}  # whatever the private rows are


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
def test_features_that_were_not_asked_for_so_are_refused(features: torch.Tensor, message: str) -> None:
    with pytest.raises(FeaturesRefused, match=message):
        device(server_features=features)


def test_an_empty_probe_set_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one probe row, got none"):
        device(probe=[], server_features=torch.zeros(0, 5).half())
