"""A version's adapter as peft loads it, and its model card, of a run with real models."""

import contextlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from assets.models import load_language_model
from cotuning.adapters import adapted
from cotuning.strategies.preparation import peft_config
from protocol.runs import Run
from protocol.strategies import LoraSettings
from tests.cloud_api.running_api import RunningApi, running_api, settings_in
from tests.tiny_models import tiny_examples
from tests.worker.cloud import LORA, Cloud, write_rows
from worker.adapter_files import get_adapter


@pytest.fixture
def published(cloud: Cloud, llm: str) -> Run:
    """A run of one round, with a version to load."""
    devices = cloud.enrol("a", "b")
    rows = write_rows(cloud.settings.home / "test.jsonl", tiny_examples(6, kind="sum"))
    run = cloud.create_run(llm, min_updates=2, evaluation_data=rows, licence="cc-by-4.0")
    cloud.work()
    for seed, device in enumerate(devices):
        cloud.deliver_untrained(device, seed=seed)
    cloud.work()
    return cloud.run(run.run_id)


def snippet_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def unpacked(api: RunningApi, run: Run, number: int, adapter: str, folder: Path) -> Path:
    answer = api.operator.get(f"/v1/runs/{run.run_id}/versions/{number}/adapters/{adapter}/package")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/x-tar")
    assert len(answer.content) == int(answer.headers["Content-Length"])
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"{run.run_id}-v{number}-{adapter}"


def test_the_snippet_of_the_card_runs_and_the_adapter_is_the_versions(
    cloud: Cloud, published: Run, llm: str, tmp_path: Path
) -> None:
    with running_api(settings_in(cloud.settings.home)) as api:
        path = f"/v1/runs/{published.run_id}/versions/1"
        answer = api.operator.get(f"{path}/model-card")
        folder = unpacked(api, published, 1, "llm", tmp_path)
    assert answer.headers["Content-Type"] == "text/markdown; charset=utf-8"
    names = sorted(each.name for each in folder.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert (folder / "README.md").read_text() == answer.text
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == llm

    found: dict[str, object] = {}
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet_of(answer.text), found)
    finally:
        os.chdir(before)
    assert isinstance(found["model"], PeftModel)
    assert printed.getvalue().endswith(f"{found['answer']}\n")
    _check_logits(cloud, published, llm, found["model"])


def _check_logits(cloud: Cloud, run: Run, llm: str, loaded: PeftModel) -> None:
    """What peft loads computes what the worker measured, and not what the base model does."""
    lm = load_language_model(llm)
    ids = torch.tensor([[5, 6, 7, 8]])
    sha256 = cloud.version(run.run_id, 1).llm_adapter_sha256
    assert sha256 is not None
    config = peft_config(lm, LoraSettings(**LORA))
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(llm)(ids).logits
        got = loaded(ids).logits
        with adapted(lm, config, {"llm": get_adapter(cloud.blobs, sha256)}) as tuned:
            expected = tuned.model(ids).logits
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, base)


def test_the_card_says_what_is_known_and_shows_no_data(cloud: Cloud, published: Run) -> None:
    with running_api(settings_in(cloud.settings.home)) as api:
        card = api.operator.get(f"/v1/runs/{published.run_id}/versions/1/model-card").text
        shown = api.operator.get(f"/v1/runs/{published.run_id}/versions/1").json()
    assert 'license: "cc-by-4.0"' in card
    assert "Licence: cc-by-4.0." in card
    assert "- Private rows: 16 on 2 devices" in card
    assert "| 1 | 0 | 1, attempt 1 | 2 | 0 |" in card
    for model in ("llm", "proxy"):
        after = shown["metrics"]["validation"][model]["bits_per_byte"]
        assert f"| validation | {model} | bits_per_byte |" in card
        assert f"| {after:.4g} | 4 |" in card
    assert '"min_updates": 2' in card
    assert "It was promoted." in card
    assert not [row.instruction for row in tiny_examples(24) if row.instruction in card]
    assert [step["num_updates"] for step in shown["lineage"]] == [2, 0]


def test_the_proxys_adapter_is_packed_too_and_version_0_can_be_loaded(
    cloud: Cloud, published: Run, tmp_path: Path
) -> None:
    with running_api(settings_in(cloud.settings.home)) as api:
        proxy = unpacked(api, published, 1, "proxy", tmp_path)
        start = unpacked(api, published, 0, "llm", tmp_path)
    assert json.loads((proxy / "adapter_config.json").read_text())["r"] == LORA["rank"]
    sha256 = cloud.version(published.run_id, 1).proxy_adapter_sha256
    assert (proxy / "adapter_model.safetensors").read_bytes() == cloud.blobs.path(sha256 or "").read_bytes()
    llm = published.config.llm
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(llm)(ids).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), start)(ids).logits
    torch.testing.assert_close(loaded, base)  # before the first round the adapter changes nothing


def test_a_run_without_adapters_has_a_card_and_no_package(cloud: Cloud) -> None:
    run = cloud.create_run(None, strategy={"name": "standalone"}, public_data=None)
    cloud.work()
    with running_api(settings_in(cloud.settings.home)) as api:
        card = api.operator.get(f"/v1/runs/{run.run_id}/versions/0/model-card")
        package = api.operator.get(f"/v1/runs/{run.run_id}/versions/0/adapters/llm/package")
    assert "leaves no adapter here" in card.text
    assert "Licence: not stated" in card.text
    assert (package.status_code, package.json()["code"]) == (404, "artifact_not_found")
