"""The model cache: loaded once, loaded again when it must be, and nothing left on the disk."""

import shutil
from pathlib import Path

import pytest
import torch

from persistence.blobs import FolderBlobStore
from protocol.errors import DomainError, ErrorCode
from tests.tiny_models import tiny_language_model
from worker.model_cache import ModelCache
from worker.preparation import store_model


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "models", FolderBlobStore(tmp_path / "blobs"))


def test_a_folder_is_loaded_again_only_when_it_changed(cache: ModelCache, llm: str, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(llm, folder)
    first = cache.llm(str(folder))
    assert cache.llm(str(folder)) is first
    (folder / "notes.txt").write_text("another file")
    assert cache.llm(str(folder)) is not first


def test_a_proxy_comes_back_from_the_store_as_it_was(cache: ModelCache, tmp_path: Path) -> None:
    proxy = tiny_language_model("llama_proxy")
    blobs = FolderBlobStore(tmp_path / "blobs")
    manifest, _ = store_model(blobs, proxy)
    loaded = cache.proxy(manifest.sha256)
    assert cache.proxy(manifest.sha256) is loaded
    assert loaded.table.fingerprint == proxy.table.fingerprint
    for (name, tensor), (other_name, other) in zip(
        proxy.model.state_dict().items(), loaded.model.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(tensor, other)
    assert list((tmp_path / "models").iterdir()) == []


def test_another_proxy_replaces_it(cache: ModelCache, tmp_path: Path) -> None:
    blobs = FolderBlobStore(tmp_path / "blobs")
    one, _ = store_model(blobs, tiny_language_model("llama_proxy"))
    other, _ = store_model(blobs, tiny_language_model("llama_proxy", seed=1))
    assert one.sha256 != other.sha256
    first = cache.proxy(one.sha256)
    assert cache.proxy(other.sha256) is not first
    assert cache.proxy(one.sha256) is not first


@pytest.mark.parametrize("held", [None, "config.json", "file"])
def test_what_is_no_model_folder_is_named(cache: ModelCache, tmp_path: Path, held: str | None) -> None:
    folder = tmp_path / "nothing"
    if held == "file":
        folder.write_text("")
    elif held:
        folder.mkdir()
        (folder / held).write_text("{}")
    with pytest.raises(DomainError) as caught:
        cache.llm(str(folder))
    assert caught.value.code is ErrorCode.MODEL_FOLDER_MISSING
    assert str(folder) in caught.value.detail
