"""An S3 server on 127.0.0.1, in a thread of the test's process, and empty stores in it."""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

from persistence.blobs import S3Address, open_store
from persistence.blobs.s3 import S3BlobStore

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "cotune-tests"


@contextmanager
def running_s3() -> Iterator[str]:
    """Serve; yield the endpoint's URL. The credentials are in the environment meanwhile."""
    before = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(CREDENTIALS)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint_url = f"http://{host}:{port}"
    try:
        client(endpoint_url).create_bucket(Bucket=BUCKET)
        yield endpoint_url
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@cache
def client(endpoint_url: str) -> Any:
    return boto3.client("s3", endpoint_url=endpoint_url, region_name="us-east-1")


def address(endpoint_url: str) -> S3Address:
    """A prefix of its own, so an empty store."""
    return S3Address(BUCKET, f"{secrets.token_hex(8)}/", endpoint_url)


@cache
def _opened(endpoint_url: str) -> S3BlobStore:
    store = open_store(S3Address(BUCKET, "", endpoint_url), Path(tempfile.mkdtemp(prefix="cotune-s3-")))
    assert isinstance(store, S3BlobStore)
    return store


def new_store(place: S3Address, scratch: Path) -> S3BlobStore:
    """An open store. Its connections are those of all others of the server, as making a client takes long."""
    store = copy(_opened(place.endpoint_url or ""))
    store._prefix, store.incoming = place.prefix, scratch / "incoming"
    store.incoming.mkdir()
    return store
