"""What only the folder of files can be asked: its paths, its permissions, its disk."""

import errno
import hashlib
import os
import resource
from pathlib import Path

import pytest

from persistence.blobs import FolderBlobStore, StagedChunk, StoredBlob
from persistence.blobs.growing import MOST_GROWING, GrowingFile, GrowingFiles
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


def stage(store: FolderBlobStore, content: bytes, offset: int) -> StagedChunk:
    with store.chunk_writer("upl_1", offset, len(content)) as writer:
        writer.write(content)
        return StagedChunk(offset, len(content), writer.commit().sha256)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def adopt(store: FolderBlobStore, content: bytes) -> StoredBlob | None:
    seen: list[bytes | None] = []
    blob = store.adopt_stage("upl_1", sha(content), len(content), lambda file: seen.append(file.read(100)))
    assert seen == ([content] if blob else [])
    return blob


def test_chunks_that_one_process_took_in_order_become_the_file_without_a_copy(store: FolderBlobStore) -> None:
    stage(store, b"first ", 0)
    with store.chunk_writer("upl_1", 6, 6) as writer:
        writer.write(b"spoilt")
        with pytest.raises(DomainError):
            writer.commit(sha(b"second"))
    last = stage(store, b"second", 6)
    (staged,) = store.staged.glob(f"upl_1/6-{last.sha256}")
    inode = staged.stat().st_ino
    assert adopt(store, b"first second") == StoredBlob(sha(b"first second"), 12)
    path = store.path(sha(b"first second"))
    assert (path.read_bytes(), path.stat().st_ino) == (b"first second", inode)
    stage(store, b"other!", 6)  # of a sender that comes too late: the file is nobody's to write any more
    assert path.read_bytes() == b"first second"
    assert adopt(store, b"first second") is None
    store.drop_stage("upl_1")
    assert path.read_bytes() == b"first second"


def test_chunks_of_several_processes_are_not_adopted_and_are_all_there(store: FolderBlobStore) -> None:
    other = FolderBlobStore(store.folder)
    chunks = [
        stage(each, text, n * 3) for n, (each, text) in enumerate([(store, b"one"), (other, b"two"), (store, b"end")])
    ]
    assert adopt(store, b"onetwoend") is None
    assert adopt(other, b"onetwoend") is None
    whole = b""
    for chunk in chunks:
        with store.open_staged("upl_1", chunk) as file:
            whole += file.read(chunk.size_bytes)
    assert whole == b"onetwoend"


def test_a_wrong_file_is_not_adopted(store: FolderBlobStore) -> None:
    def refuse(_: object) -> None:
        raise DomainError(ErrorCode.NOT_SAFETENSORS, "no")

    stage(store, b"wrong", 0)
    with pytest.raises(DomainError) as caught:
        adopt(store, b"right")
    assert caught.value.code is ErrorCode.DIGEST_MISMATCH
    store.drop_stage("upl_1")
    stage(store, b"wrong", 0)
    with pytest.raises(DomainError) as caught:
        store.adopt_stage("upl_1", sha(b"wrong"), 5, refuse)
    assert caught.value.code is ErrorCode.NOT_SAFETENSORS
    assert list(store.objects()) == []


def test_a_process_remembers_a_bounded_number_of_uploads() -> None:
    files = GrowingFiles()
    for number in range(MOST_GROWING + 1):
        files.give(f"upl_{number}", GrowingFile(Path("x"), 1, None))
    assert files.take("upl_0", 1) is None
    assert files.take("upl_1", 1) is not None
    assert files.take("upl_1", 1) is None
