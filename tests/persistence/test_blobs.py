"""The folder of files: whole and durable, or not there at all."""

import errno
import hashlib
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.blobs import FolderBlobStore, StoredBlob
from persistence.errors import StorageError
from protocol.errors import DomainError, ErrorCode


@pytest.fixture
def store(tmp_path: Path) -> FolderBlobStore:
    return FolderBlobStore(tmp_path / "new" / "blobs")


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def left_over(store: FolderBlobStore) -> list[Path]:
    return list(store.incoming.iterdir())


@given(chunks=st.lists(st.binary(max_size=200), max_size=8))
def test_what_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]) -> None:
    store = FolderBlobStore(tmp_path_factory.getbasetemp() / "hypothesis-blobs")
    content = b"".join(chunks)
    with store.writer(max_bytes=len(content)) as writer:
        for chunk in chunks:
            writer.write(chunk)
        stored = writer.commit(sha(content))
    assert stored == StoredBlob(sha(content), len(content))
    assert store.path(stored.sha256).read_bytes() == content
    assert store.exists(stored.sha256)
    assert store.size(stored.sha256) == len(content)
    with store.open(stored.sha256) as file:
        assert file.read() == content
    assert left_over(store) == []


def test_bytes_and_files(store: FolderBlobStore, tmp_path: Path) -> None:
    content = os.urandom(3 * 2**20 + 1)
    source = tmp_path / "source.bin"
    source.write_bytes(content)
    assert store.put_file(source) == store.put_bytes(content) == StoredBlob(sha(content), len(content))
    assert store.path(sha(content)).read_bytes() == content


def test_the_same_content_is_stored_once_and_not_touched_again(store: FolderBlobStore) -> None:
    store.put_bytes(b"x")
    before = store.path(sha(b"x")).stat()
    store.put_bytes(b"x")
    after = store.path(sha(b"x")).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_wrong_bytes_are_refused_and_nothing_is_kept(store: FolderBlobStore) -> None:
    with store.writer() as writer:
        writer.write(b"other bytes")
        with pytest.raises(DomainError) as caught:
            writer.commit(sha(b"these bytes"))
    assert caught.value.code is ErrorCode.DIGEST_MISMATCH
    assert (caught.value.expected, caught.value.received) == (sha(b"these bytes"), sha(b"other bytes"))
    assert not store.exists(sha(b"other bytes"))
    assert left_over(store) == []


def test_too_many_bytes_are_refused_before_they_are_written(store: FolderBlobStore) -> None:
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


def test_what_is_not_committed_leaves_nothing(store: FolderBlobStore) -> None:
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


def test_writers_of_the_same_content_at_once(store: FolderBlobStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(lambda _: store.put_bytes(b"same" * 1000), range(32)))
    assert set(stored) == {StoredBlob(sha(b"same" * 1000), 4000)}
    assert store.path(stored[0].sha256).read_bytes() == b"same" * 1000
    assert left_over(store) == []


@pytest.mark.parametrize("name", ["", "x", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", "٣" * 64])
def test_what_is_not_a_hash_is_not_a_path(store: FolderBlobStore, name: str) -> None:
    for function in (store.path, store.exists, store.size, store.open):
        with pytest.raises(DomainError) as caught:
            function(name)
        assert caught.value.code is ErrorCode.ARTIFACT_NOT_FOUND


def test_a_file_that_is_not_there(store: FolderBlobStore) -> None:
    assert not store.exists("0" * 64)
    for function in (store.size, store.open):
        with pytest.raises(DomainError) as caught:
            function("0" * 64)
        assert caught.value.code is ErrorCode.ARTIFACT_NOT_FOUND


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StorageError, match=f"{file}.*must be a folder that can be written"):
        FolderBlobStore(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    FolderBlobStore(folder)
    (folder / "incoming").chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        FolderBlobStore(folder)


def test_a_disk_that_takes_no_more_is_unavailable_and_nothing_is_kept(store: FolderBlobStore) -> None:
    """A limit on the size of files stands for a full disk: the write is cut short, the next one fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DomainError, match=os.strerror(errno.EFBIG)) as caught:
            store.put_bytes(bytes(1500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert left_over(store) == []
    assert store.put_bytes(bytes(1500)).size == 1500


def test_a_store_that_was_removed_is_unavailable(store: FolderBlobStore) -> None:
    store.incoming.rmdir()
    with pytest.raises(DomainError) as caught:
        store.writer()
    assert caught.value.code is ErrorCode.UNAVAILABLE
