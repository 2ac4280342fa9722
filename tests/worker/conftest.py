"""Fixtures of the worker's tests: an LLM's folder, and an empty migrated cloud on SQLite."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from assets.models import save_language_model
from tests.tiny_models import tiny_language_model
from tests.worker.cloud import Cloud
from worker.settings import Settings, prepare_folders

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "llm"
    save_language_model(tiny_language_model("llama"), folder)
    return str(folder)


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite: Path) -> Settings:
    shutil.copy(migrated_sqlite, tmp_path / "cotune.sqlite3")
    settings = Settings.from_environment({"COTUNE_HOME": str(tmp_path), "COTUNE_TORCH_THREADS": "1"})
    prepare_folders(settings)
    return settings


@pytest.fixture
def cloud(settings: Settings) -> Iterator[Cloud]:
    cloud = Cloud(settings)
    yield cloud
    cloud.database.dispose()
