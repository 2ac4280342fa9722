from pathlib import Path

import torch

from assets.models import load_language_model, save_language_model
from cotuning.adapters import attach_adapter, lora_config
from cotuning.model_fingerprint import fingerprint_model
from tests.tiny_models import NAMES, tiny_language_model


def test_a_model_keeps_its_fingerprint_whatever_its_files_look_like(tmp_path: Path) -> None:
    lm = tiny_language_model("qwen2")  # its head is tied to its embeddings
    save_language_model(lm, tmp_path / "one")
    lm.model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    lm.tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    prints = {fingerprint_model(load_language_model(tmp_path / name)) for name in ("one", "shards")}
    assert prints == {fingerprint_model(lm)}


def test_models_that_differ_have_other_fingerprints() -> None:
    prints = {fingerprint_model(tiny_language_model(name)) for name in NAMES}
    assert len({each.weights for each in prints}) == len({each.tokenizer for each in prints}) == len(NAMES)
    proxy, llm = (fingerprint_model(tiny_language_model(name)) for name in ("llama_proxy", "llama"))
    assert proxy.tokenizer == llm.tokenizer
    assert proxy.weights != llm.weights


def test_one_changed_weight_is_seen_and_an_adapter_is_not() -> None:
    lm = tiny_language_model("gpt2")
    before = fingerprint_model(lm)
    adapted = attach_adapter(lm, "any", lora_config(lm, rank=2, alpha=4.0), seed=0)
    lm = adapted.with_model(adapted.model.unload())
    assert fingerprint_model(lm) == before
    with torch.no_grad():
        lm.model.transformer.h[1].ln_1.bias[3] += 1e-3
    after = fingerprint_model(lm)
    assert after.tokenizer == before.tokenizer
    assert after.weights != before.weights
