"""Every blob store, by one suite: a file is there whole and right, or not at all."""

import hashlib
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persistence.blobs import BlobStore, FolderBlobStore, S3Address, StagedChunk, StoredBlob, open_store, read_address
from persistence.errors import StorageError
from protocol.errors import DomainError, ErrorCode
from tests.s3_server import address, new_store


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "folder":
        return FolderBlobStore(tmp_path / "new" / "blobs")
    return new_store(address(request.getfixturevalue("s3")), tmp_path)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def left_over(store: BlobStore) -> list[Path]:
    return list(store.incoming.iterdir())


def read(store: BlobStore, sha256: str, start: int = 0) -> bytes:
    with store.open(sha256, start) as file:
        return file.read()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.lists(st.binary(max_size=200), max_size=8), data=st.data())
def test_what_goes_in_comes_out(store: BlobStore, chunks: list[bytes], data: st.DataObject) -> None:
    content = b"".join(chunks)
    with store.writer(max_bytes=len(content)) as writer:
        for chunk in chunks:
            writer.write(chunk)
        stored = writer.commit(sha(content))
    assert stored == StoredBlob(sha(content), len(content))
    assert store.exists(stored.sha256)
    assert store.size(stored.sha256) == len(content)
    start = data.draw(st.integers(0, max(0, len(content) - 1)))
    assert read(store, stored.sha256, start) == content[start:]
    with store.local(stored.sha256) as path:
        assert path.read_bytes() == content
    assert left_over(store) == []


@pytest.mark.parametrize("size", [3 * 2**20 + 1, 8 * 2**20, 19 * 2**20 + 7])
def test_bytes_and_files_large_and_small(store: BlobStore, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    source = tmp_path / "source.bin"
    source.write_bytes(content)
    assert store.put_file(source) == store.put_bytes(content) == StoredBlob(sha(content), len(content))
    assert read(store, sha(content)) == content
    assert read(store, sha(content), size - 1) == content[-1:]


def test_reading_piece_by_piece(store: BlobStore) -> None:
    content = bytes(range(256)) * 10
    with store.open(store.put_bytes(content).sha256, 100) as file:
        pieces = iter(lambda: file.read(77), b"")
        assert b"".join(pieces) == content[100:]


def test_wrong_bytes_are_refused_and_nothing_is_kept(store: BlobStore) -> None:
    with store.writer() as writer:
        writer.write(b"other bytes")
        with pytest.raises(DomainError) as caught:
            writer.commit(sha(b"these bytes"))
    assert caught.value.code is ErrorCode.DIGEST_MISMATCH
    assert (caught.value.expected, caught.value.received) == (sha(b"these bytes"), sha(b"other bytes"))
    assert not store.exists(sha(b"other bytes"))
    assert list(store.objects()) == []
    assert left_over(store) == []


def test_too_many_bytes_are_refused_before_they_are_written(store: BlobStore) -> None:
    with store.writer(max_bytes=10) as writer:
        writer.write(b"12345678")
        with pytest.raises(DomainError) as caught:
            writer.write(b"901")
        assert caught.value.code is ErrorCode.BODY_TOO_LARGE
        assert (caught.value.expected, caught.value.received) == (10, 11)
        (unfinished,) = left_over(store)
        assert unfinished.stat().st_size == 8
        writer.write(b"90")
        assert writer.commit().size == 10


def test_what_is_not_committed_leaves_nothing(store: BlobStore) -> None:
    def cut() -> None:
        with store.writer() as writer:
            writer.write(b"half")
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        cut()
    writer = store.writer()
    writer.write(b"half")
    writer.abort()
    writer.abort()
    assert left_over(store) == []
    assert not store.exists(sha(b"half"))


def test_writers_of_the_same_content_at_once(store: BlobStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(lambda _: store.put_bytes(b"same" * 1000), range(16)))
    assert set(stored) == {StoredBlob(sha(b"same" * 1000), 4000)}
    assert read(store, stored[0].sha256) == b"same" * 1000
    assert [each.sha256 for each in store.objects()] == [stored[0].sha256]
    assert left_over(store) == []


@pytest.mark.parametrize("name", ["", "x", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", "٣" * 64])
def test_what_is_not_a_hash_is_not_a_path(store: BlobStore, name: str) -> None:
    for function in (store.exists, store.size, store.open, store.remove):
        with pytest.raises(DomainError) as caught:
            function(name)
        assert caught.value.code is ErrorCode.ARTIFACT_NOT_FOUND


def test_a_file_that_is_not_there(store: BlobStore) -> None:
    assert not store.exists("0" * 64)
    assert store.stat("0" * 64) is None
    store.remove("0" * 64)

    def copy(sha256: str) -> None:
        with store.local(sha256):
            pass

    for function in (store.size, store.open, copy):
        with pytest.raises(DomainError) as caught:
            function("0" * 64)
        assert caught.value.code is ErrorCode.ARTIFACT_NOT_FOUND
    assert left_over(store) == []


def test_a_listing_shows_every_file_and_its_age(store: BlobStore) -> None:
    contents = [b"one", b"two", b"", b"three"]
    for content in contents:
        store.put_bytes(content)
    listed = list(store.objects())
    assert [(each.sha256, each.size) for each in listed] == sorted((sha(content), len(content)) for content in contents)
    now = datetime.now(UTC)
    assert all(abs(now - each.modified) < timedelta(seconds=30) for each in listed)
    store.remove(sha(b"two"))
    assert sha(b"two") not in {each.sha256 for each in store.objects()}
    assert not store.exists(sha(b"two"))


def stage(store: BlobStore, name: str, content: bytes, offset: int = 0) -> StagedChunk:
    with store.chunk_writer(name, offset, len(content)) as writer:
        writer.write(content)
        return StagedChunk(offset, len(content), writer.commit(sha(content)).sha256)


def read_chunk(store: BlobStore, name: str, chunk: StagedChunk) -> bytes:
    with store.open_staged(name, chunk) as file:
        return file.read(chunk.size_bytes)


def test_chunks_wait_in_their_stage_and_go_with_it(store: BlobStore) -> None:
    first, second = stage(store, "upl_1", b"first"), stage(store, "upl_1", b"second", 5)
    other = stage(store, "upl_2", b"first")
    assert stage(store, "upl_1", b"first") == first == other
    assert read_chunk(store, "upl_1", first) + read_chunk(store, "upl_1", second) == b"firstsecond"
    assert list(store.objects()) == []
    assert not store.exists(first.sha256)
    assert {name for name, _ in store.stages()} == {"upl_1", "upl_2"}
    store.drop_stage("upl_1")
    store.drop_stage("upl_1")
    with pytest.raises(DomainError) as caught:
        store.open_staged("upl_1", first)
    assert caught.value.code is ErrorCode.ARTIFACT_NOT_FOUND
    assert [name for name, _ in store.stages()] == ["upl_2"]
    assert read_chunk(store, "upl_2", other) == b"first"
    assert stage(store, "upl_1", b"second", 5) == second  # a late one does not know that the stage was dropped
    assert left_over(store) == []


def test_a_chunk_that_was_given_up_or_is_wrong_spoils_no_other(store: BlobStore) -> None:
    first = stage(store, "upl_1", b"first")
    for wrong in (b"wrong", b"wr"):
        with store.chunk_writer("upl_1", 5, 5) as writer:
            writer.write(wrong)
            with pytest.raises(DomainError):
                writer.commit(sha(b"right"))
    with store.chunk_writer("upl_1", 5, 5) as slow:
        slow.write(b"ri")
        second = stage(store, "upl_1", b"right", 5)
        slow.write(b"ght")
        assert slow.commit(sha(b"right")).sha256 == second.sha256
    assert read_chunk(store, "upl_1", first) + read_chunk(store, "upl_1", second) == b"firstright"
    with pytest.raises(DomainError), store.chunk_writer("upl_1", 10, 3) as writer:
        writer.write(b"long")
    assert left_over(store) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../objects", "x" * 65])
def test_what_is_not_the_name_of_a_stage_is_not_a_path(store: BlobStore, name: str) -> None:
    for action in (lambda: store.chunk_writer(name, 0, 1), lambda: store.drop_stage(name)):
        with pytest.raises(ValueError, match="letters, digits"):
            action()


def test_what_was_left_unfinished_is_removed_when_it_is_old(store: BlobStore) -> None:
    writer = store.writer()
    writer.write(b"half")
    (path,) = left_over(store)
    assert store.remove_unfinished(datetime.now(UTC) - timedelta(hours=1)) == 0
    long_ago = datetime.now(UTC).timestamp() - 7200
    os.utime(path, (long_ago, long_ago))
    assert store.remove_unfinished(datetime.now(UTC) - timedelta(hours=1)) == 1
    assert left_over(store) == []
    writer.abort()


def test_a_store_that_answers_is_ready(store: BlobStore) -> None:
    store.check()
    with store.open(store.put_bytes(b"x").sha256) as file:
        assert isinstance(file, io.BufferedIOBase)


def test_addresses(tmp_path: Path) -> None:
    assert read_address({}, tmp_path) == tmp_path / "blobs"
    assert read_address({"COTUNE_BLOBS": "/data"}, tmp_path) == Path("/data")
    endpoint = {"COTUNE_S3_ENDPOINT_URL": "https://store:9000"}
    assert read_address({"COTUNE_BLOBS": "s3://bucket/a/b/"} | endpoint, tmp_path) == S3Address(
        "bucket", "a/b/", "https://store:9000"
    )
    assert read_address({"COTUNE_BLOBS": "s3://bucket"}, tmp_path) == S3Address("bucket", "", None)


def test_an_object_store_receives_into_the_folder_that_is_named(s3: str, tmp_path: Path) -> None:
    named = {"COTUNE_BLOBS": "s3://bucket", "COTUNE_S3_SCRATCH": str(tmp_path / "disk")}
    found = read_address(named, tmp_path)
    assert found == S3Address("bucket", scratch=tmp_path / "disk")
    place = replace(address(s3), scratch=tmp_path / "disk")
    store = open_store(place, tmp_path / "memory")
    with store.writer() as writer:
        writer.write(b"half")
        assert len(list((tmp_path / "disk" / "incoming").iterdir())) == 1
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize(
    ("blobs", "endpoint", "said"),
    [
        ("http://bucket/x", "", "s3://<bucket>/<prefix>"),
        ("s3://", "", "s3://<bucket>/<prefix>"),
        ("s3://UPPER", "", "s3://<bucket>/<prefix>"),
        ("s3://key:hidden@bucket", "", "s3://<bucket>/<prefix>"),
        ("s3://bucket/a?b=c", "", "s3://<bucket>/<prefix>"),
        ("s3://bucket", "store:9000", "http"),
        ("s3://bucket", "https://key:hidden@store", "without a user"),
    ],
)
def test_addresses_that_cannot_be_used_are_named_without_their_secrets(
    tmp_path: Path, blobs: str, endpoint: str, said: str
) -> None:
    with pytest.raises(ValueError, match="COTUNE_") as caught:
        read_address({"COTUNE_BLOBS": blobs, "COTUNE_S3_ENDPOINT_URL": endpoint}, tmp_path)
    assert said in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_named(s3: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="s3://no-such-bucket/"):
        open_store(S3Address("no-such-bucket", "", s3), tmp_path)


def test_an_object_store_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "persistence.blobs.s3", raising=False)
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(StorageError, match=r"cotune\[s3\]"):
        open_store(S3Address("bucket"), tmp_path)
