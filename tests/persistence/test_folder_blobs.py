"""What only the folder of files can be asked: its paths, its permissions, its disk."""

import errno
import hashlib
import os
import resource
from pathlib import Path

import pytest

from persistence.blobs import FolderBlobStore
from persistence.errors import StorageError
from protocol.errors import DomainError, ErrorCode


@pytest.fixture
def store(tmp_path: Path) -> FolderBlobStore:
    return FolderBlobStore(tmp_path / "blobs")


def left_over(store: FolderBlobStore) -> list[Path]:
    return list(store.incoming.iterdir())


def test_the_same_content_is_stored_once_and_not_touched_again(store: FolderBlobStore) -> None:
    sha256 = store.put_bytes(b"x").sha256
    before = store.path(sha256).stat()
    store.put_bytes(b"x")
    after = store.path(sha256).stat()
    assert sha256 == hashlib.sha256(b"x").hexdigest()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_the_local_file_is_the_stored_one(store: FolderBlobStore) -> None:
    sha256 = store.put_bytes(b"x").sha256
    with store.local(sha256) as path:
        assert path == store.path(sha256)
    assert path.read_bytes() == b"x"
    assert store.link(sha256, 60) is None


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


def test_a_folder_that_cannot_be_written_is_not_ready(store: FolderBlobStore) -> None:
    store.check()
    store.incoming.rmdir()
    with pytest.raises(DomainError) as caught:
        store.check()
    assert caught.value.code is ErrorCode.UNAVAILABLE
