from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import is_bitsandbytes_available

from assets.devices import available_memory, chosen_devices, four_bit_config, spread_layers
from assets.errors import DeviceError
from assets.models import load_language_model, save_language_model
from tests.tiny_models import NAMES, tiny_language_model

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_somewhere_layers_in_order_and_the_rest_on_the_first(name: str) -> None:
    lm = tiny_language_model(name)
    devices = spread_layers(lm.model.config, ["cuda:0", "cuda:1"])
    places: dict[str, str] = {}
    for weight, _ in lm.model.named_parameters():
        holders = [module for module in devices if weight.startswith(f"{module}.")]
        assert len(holders) == 1, weight
        places[weight] = devices[holders[0]]
    total = lm.model.config.num_hidden_layers
    half = -(-total // 2)
    for weight, device in places.items():
        numbers = [int(part) for part in weight.split(".") if part.isdecimal()]
        assert device == ("cuda:1" if numbers and numbers[0] >= half else "cuda:0")
    assert set(devices.values()) == {"cuda:0", "cuda:1"}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_loads_by_such_a_map(name: str, tmp_path: Path) -> None:
    lm = tiny_language_model(name)
    save_language_model(lm, tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=spread_layers(lm.model.config, ["cpu", "cpu"]))
    ids_BT = torch.tensor([[1, 5, 9, 4]])
    with torch.no_grad():
        assert torch.equal(mapped(input_ids=ids_BT).logits, lm.model(input_ids=ids_BT).logits)


@NO_GPU
def test_without_a_gpu_everything_is_on_the_cpu(tmp_path: Path) -> None:
    assert chosen_devices("auto") == chosen_devices("cpu") == ["cpu"]
    save_language_model(tiny_language_model("llama"), tmp_path)
    lm = load_language_model(str(tmp_path), dtype=torch.bfloat16, devices="auto")
    assert lm.device.type == "cpu"
    assert {tensor.dtype for tensor in lm.model.parameters()} == {torch.bfloat16}


def test_available_memory_counts_what_is_free_and_what_is_ours() -> None:
    available = available_memory("cpu")
    assert list(available) == ["cpu"]
    assert 50_000_000 < available["cpu"] < 2**50


@pytest.mark.skipif(is_bitsandbytes_available(), reason="bitsandbytes is installed")
def test_four_bits_without_the_package_for_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="expected the package bitsandbytes for 4-bit weights, found none"):
        four_bit_config()
    save_language_model(tiny_language_model("llama"), tmp_path)
    with pytest.raises(DeviceError, match="pip install bitsandbytes"):
        load_language_model(str(tmp_path), four_bit=True)


def test_four_bits_are_nf4_with_double_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assets.devices.is_bitsandbytes_available", lambda: True)
    config = four_bit_config()
    assert config.load_in_4bit
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
