"""For every test: one thread a process, set before torch or a tokenizer is imported anywhere.

The models of the tests are so small that a second thread only waits for the first, and on a busy machine waits long.
"""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3 server of these tests."""
    from tests.s3_server import running_s3

    with running_s3() as endpoint_url:
        yield endpoint_url
