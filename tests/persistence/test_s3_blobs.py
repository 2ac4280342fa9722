"""What only the object store can be asked: parts, links, faults on the way."""

import hashlib
import os
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from botocore.exceptions import EndpointConnectionError

from persistence.blobs import S3Address
from persistence.blobs.s3 import PART_BYTES, S3BlobStore
from protocol.errors import DomainError, ErrorCode
from tests.s3_server import BUCKET, CREDENTIALS, address, client, new_store


@pytest.fixture
def place(s3: str) -> S3Address:
    return address(s3)


@pytest.fixture
def store(place: S3Address, tmp_path: Path) -> S3BlobStore:
    return new_store(place, tmp_path)


def keys(place: S3Address) -> list[str]:
    listed = client(place.endpoint_url or "").list_objects_v2(Bucket=BUCKET, Prefix=place.prefix)
    return [each["Key"] for each in listed.get("Contents", ())]


def multipart_uploads(place: S3Address) -> list[dict[str, Any]]:
    answer = client(place.endpoint_url or "").list_multipart_uploads(Bucket=BUCKET, Prefix=place.prefix)
    uploads: list[dict[str, Any]] = answer.get("Uploads", [])
    return uploads


def test_a_large_file_that_breaks_off_leaves_no_object_and_no_parts(
    store: S3BlobStore, place: S3Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(2 * PART_BYTES + 1)
    send, sent = store._client.upload_part, []

    def break_at_the_second(**arguments: Any) -> Any:
        sent.append(len(arguments["Body"]))
        assert keys(place) == [], "a part of a file was visible"
        if len(sent) == 2:
            raise EndpointConnectionError(endpoint_url="http://gone")
        return send(**arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store._client, "upload_part", break_at_the_second)
        with pytest.raises(DomainError) as caught:
            store.put_bytes(content)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert sent == [PART_BYTES, PART_BYTES]
    assert keys(place) == []
    assert multipart_uploads(place) == []
    assert store.put_bytes(content).size == len(content)
    assert len(keys(place)) == 1


def test_a_multipart_upload_whose_process_died_is_ended_by_the_sweep(store: S3BlobStore, place: S3Address) -> None:
    client(place.endpoint_url or "").create_multipart_upload(Bucket=BUCKET, Key=f"{place.prefix}objects/00/dead")
    assert len(multipart_uploads(place)) == 1
    # The server of these tests gives every multipart upload the same old date.
    assert store.remove_unfinished(datetime(2000, 1, 1, tzinfo=UTC)) == 0
    assert store.remove_unfinished(datetime.now(UTC) - timedelta(days=1)) == 1
    assert multipart_uploads(place) == []


def test_memory_does_not_grow_with_the_file(
    store: S3BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "large.bin"
    with source.open("wb") as file:
        file.truncate(8 * PART_BYTES)
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    held: list[int] = []

    def receive(**arguments: Any) -> dict[str, str]:
        held.append(tracemalloc.get_traced_memory()[0])
        assert len(arguments["Body"]) <= PART_BYTES
        return {"ETag": "x"}

    # The server, which holds every byte, is in this process, so another one receives.
    monkeypatch.setattr(store._client, "upload_part", receive)
    monkeypatch.setattr(store._client, "complete_multipart_upload", lambda **_: None)
    tracemalloc.start()
    try:
        assert store.put_file(source).sha256 == sha256
    finally:
        tracemalloc.stop()
    assert len(held) == 8
    assert max(held) < 3 * PART_BYTES


def test_a_link_gives_the_file_without_a_credential_and_not_for_long(store: S3BlobStore) -> None:
    content = b"public for a minute"
    link = store.link(store.put_bytes(content).sha256, 60)
    assert link is not None
    assert "X-Amz-Expires=60" in link
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in link
    with httpx.Client(trust_env=False) as http:
        assert http.get(link).content == content
        part = http.get(link, headers={"Range": "bytes=7-"})
    assert (part.status_code, part.content) == (206, content[7:])


def test_an_object_that_was_changed_behind_our_back_is_not_used(store: S3BlobStore, place: S3Address) -> None:
    stored = store.put_bytes(b"right")
    (key,) = keys(place)
    client(place.endpoint_url or "").put_object(Bucket=BUCKET, Key=key, Body=b"wrong")

    def use() -> None:
        with store.local(stored.sha256) as path:
            raise AssertionError(f"{path} was given out")

    with pytest.raises(DomainError) as caught:
        use()
    assert caught.value.code is ErrorCode.DIGEST_MISMATCH
    assert list(store.incoming.iterdir()) == []


def test_a_server_that_is_away_is_unavailable_and_tells_no_secret(
    store: S3BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(**_: Any) -> None:
        raise EndpointConnectionError(endpoint_url="http://gone")

    for name in ("head_object", "get_object", "put_object", "head_bucket", "delete_object"):
        monkeypatch.setattr(store._client, name, away)
    calls = (
        store.check,
        lambda: store.exists("0" * 64),
        lambda: store.open("0" * 64),
        lambda: store.put_bytes(b"x"),
        lambda: store.remove("0" * 64),
    )
    for call in calls:
        with pytest.raises(DomainError, match="s3://") as caught:
            call()
        assert caught.value.code is ErrorCode.UNAVAILABLE
        assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in caught.value.detail
