"""For every test: one thread a process, set before torch or a tokenizer is imported anywhere.

The models of the tests are so small that a second thread only waits for the first, and on a busy machine waits long.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Asked only where several processes run the tests; without pytest-xdist nobody asks."""
    from tests.distribution import WholeFiles

    return WholeFiles(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes
        from tests.distribution import long_first

        items[:] = long_first(items)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an empty database with the migrations applied, to be copied: copying is quicker than migrating."""
    from persistence import schema

    path = tmp_path_factory.mktemp("sqlite") / "cotune.sqlite3"
    schema.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3 server of these tests."""
    from tests.s3_server import running_s3

    with running_s3() as endpoint_url:
        yield endpoint_url
