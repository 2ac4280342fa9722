"""Fixtures of the worker's tests: an LLM's folder, and an empty migrated cloud on SQLite."""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch
from sqlalchemy import create_engine, exc, make_url, text

from assets.models import save_language_model
from tests.tiny_models import tiny_language_model
from tests.worker.cloud import Cloud
from worker.settings import Settings, prepare_folders

torch.set_num_threads(1)

POSTGRES = os.environ.get("COTUNE_TEST_POSTGRES", "postgresql+psycopg://root@127.0.0.1/test")
REDIS = os.environ.get("COTUNE_TEST_REDIS", "redis://127.0.0.1:6379/0")


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


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Settings]:
    """PostgreSQL and Redis: a database and a queue prefix of our own, removed afterwards."""
    server = create_engine(POSTGRES, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    mark = f"cotune_test_worker_{secrets.token_hex(6)}"
    broker = redis.Redis.from_url(REDIS, socket_connect_timeout=3)
    try:
        broker.ping()
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {mark}"))
    except (exc.OperationalError, redis.ConnectionError) as error:
        server.dispose()
        pytest.skip(f"PostgreSQL ({make_url(POSTGRES).render_as_string()}) or Redis ({REDIS}) does not answer: {error}")
    settings = Settings.from_environment(
        {
            "COTUNE_HOME": str(tmp_path),
            "COTUNE_DATABASE_URL": make_url(POSTGRES).set(database=mark).render_as_string(hide_password=False),
            "COTUNE_BROKER_URL": REDIS,
            "COTUNE_QUEUE_PREFIX": f"{mark}_",
            "COTUNE_SWEEP_SECONDS": "0.5",
        }
    )
    prepare_folders(settings)
    try:
        yield settings
    finally:
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {mark} WITH (FORCE)"))
        server.dispose()
        for key in broker.scan_iter(f"*{mark}*", count=1000):
            broker.delete(key)
        broker.close()
