"""For every test: one thread a process, set before torch or a tokenizer is imported anywhere.

The models of the tests are so small that a second thread only waits for the first, and on a busy machine waits long.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
