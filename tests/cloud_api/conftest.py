"""`api`: one for a module's tests, whose runs are for their own devices. `fresh_api`: one with an empty database."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.cloud_api.running_api import RunningApi, running_api, settings_in
from tests.s3_server import address


@pytest.fixture(scope="package", autouse=True)
def quiet_logs() -> Iterator[None]:
    """structlog's default prints the locals of every frame of a traceback, which takes many seconds."""
    structlog.configure(
        processors=[structlog.processors.KeyValueRenderer()], logger_factory=structlog.ReturnLoggerFactory()
    )
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def migrated_file(migrated_sqlite: Path) -> Path:
    return migrated_sqlite


@pytest.fixture
def home(tmp_path: Path, migrated_file: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copy(migrated_file, folder / "cotune.sqlite3")
    return folder


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, migrated_file: Path) -> Iterator[RunningApi]:
    home = tmp_path_factory.mktemp("home")
    shutil.copy(migrated_file, home / "cotune.sqlite3")
    with running_api(settings_in(home)) as running:
        yield running


@pytest.fixture(scope="module", params=["folder", "s3"])
def store_api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, migrated_file: Path
) -> Iterator[RunningApi]:
    """An API that takes very small chunks, with either kind of blob store."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(migrated_file, home / "cotune.sqlite3")
    blobs = home / "blobs" if request.param == "folder" else address(request.getfixturevalue("s3"))
    with running_api(settings_in(home, upload_chunk_bytes=100, blobs=blobs)) as running:
        yield running


@pytest.fixture
def fresh_api(home: Path) -> Iterator[RunningApi]:
    with running_api(settings_in(home)) as running:
        yield running
