import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save

from assets.adapters import read_adapter, save_adapter
from assets.errors import AssetError, ModelFolderError
from assets.models import list_model_files, load_language_model, save_language_model
from cotuning.adapters import adapted, fresh_adapter, lora_config
from cotuning.language_model import hidden_states
from tests.tiny_models import NAMES, tiny_language_model

IDS_BT = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_round_trips_through_an_ordinary_folder(tmp_path: Path, name: str) -> None:
    lm = tiny_language_model(name)
    save_language_model(lm, tmp_path / "model")
    loaded = load_language_model(tmp_path / "model")
    assert loaded.architecture == lm.architecture
    assert loaded.table.fingerprint == lm.table.fingerprint
    assert not any(tensor.requires_grad for tensor in loaded.model.parameters())
    assert not loaded.model.training
    with torch.no_grad():
        assert torch.equal(hidden_states(loaded, IDS_BT), hidden_states(lm, IDS_BT))
    names = [path.name for path in list_model_files(tmp_path / "model")]
    assert names == sorted(names)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)


def test_dtype(tmp_path: Path) -> None:
    save_language_model(tiny_language_model("llama"), tmp_path)
    assert load_language_model(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert load_language_model(str(tmp_path)).model.dtype == torch.float32


def test_what_is_not_a_model_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"nowhere: expected a model folder, found nothing there; .*config.json"):
        load_language_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelFolderError, match="found a file"):
        load_language_model(tmp_path / "file")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ModelFolderError, match=r"folder: expected config.json, found notes.txt"):
        load_language_model(folder)
    with pytest.raises(ModelFolderError, match=r"expected config\.json"):
        list_model_files(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 3}))
    with pytest.raises(ModelFolderError, match="expected a causal language model"):
        load_language_model(folder)


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    save_language_model(tiny_language_model("gpt2"), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(AssetError, match="expected a causal language model"):
        load_language_model(tmp_path)
    tensors = load(weights)
    tensors.pop("transformer.h.0.ln_1.weight")
    (tmp_path / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    with pytest.raises(AssetError, match=r"expected all weights, 1 are missing: transformer.h.0.ln_1.weight"):
        load_language_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(AssetError, match="expected a causal language model"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_is_one_that_peft_loads(tmp_path: Path, name: str) -> None:
    lm = tiny_language_model(name)
    config = lora_config(lm, rank=2, alpha=4.0)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(tensor.shape, generator=generator) for key, tensor in fresh_adapter(lm, config, seed=0).items()
    }
    save_adapter(tmp_path, state, config, "some/base")
    with adapted(lm, config, {"slm": state}) as lent, torch.no_grad():
        expected = hidden_states(lent, IDS_BT)
    by_peft = PeftModel.from_pretrained(tiny_language_model(name).model, str(tmp_path))
    with torch.no_grad():
        output = by_peft.get_base_model().base_model(input_ids=IDS_BT).last_hidden_state
    torch.testing.assert_close(output, expected)
    assert by_peft.peft_config["default"].base_model_name_or_path == "some/base"

    read, read_config = read_adapter(tmp_path)
    assert all(torch.equal(read[key], state[key]) for key in state)
    assert (read_config.r, read_config.lora_alpha) == (2, 4.0)
    assert config.base_model_name_or_path is None


def test_saving_the_same_adapter_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    lm = tiny_language_model("llama")
    config = lora_config(lm, rank=2, alpha=4.0)
    state = fresh_adapter(lm, config, seed=0)
    for folder in ("one", "two"):
        save_adapter(tmp_path / folder, state, config, "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"expected an adapter folder with adapter_config.json"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_head": 0},
        {"n_embd": None},
        {"attn_implementation": "owner/code"},
        {"attn_implementation": "flash_attention_2"},
    ],
)
def test_a_config_that_makes_no_sense_or_asks_for_code_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    save_language_model(tiny_language_model("gpt2"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(ModelFolderError, match="expected a causal language model"):
        load_language_model(tmp_path)
