"""A folder as a blob store.

`<folder>/objects/<first two digits>/<sha256>` holds the files, `<folder>/staged/<upload>/` the chunks of uploads (see
`persistence.blobs.growing`); `<folder>/incoming/` holds what is still being written. A file is written there,
synchronised, renamed, and then its folder is synchronised: after a power cut either the old state or the new one is
found. Several processes, also of several machines, may share the folder.
"""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from persistence.blobs.growing import GrowingFiles, GrowingWriter, chunk_path
from persistence.blobs.interface import (
    BlobStore,
    BlobWriter,
    StagedChunk,
    StoredBlob,
    StoredObject,
    check_sha256,
    check_stage,
    missing,
    other_bytes,
    unavailable,
)
from persistence.errors import StorageError
from protocol.errors import DomainError, ErrorCode


class FolderBlobStore(BlobStore):
    """Files in a folder.

    Raises:
        StorageError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.objects_folder = self.folder / "objects"
        self.staged = self.folder / "staged"
        self._growing = GrowingFiles()
        super().__init__(self.folder / "incoming")
        try:
            self.objects_folder.mkdir(exist_ok=True)
            self.staged.mkdir(exist_ok=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise StorageError(
                f"the blob folder {self.folder} must be a folder that can be written: {reason}"
            ) from error

    def path(self, sha256: str) -> Path:
        """Return where a file is or would be. Raises DomainError ARTIFACT_NOT_FOUND for what is not a SHA-256."""
        check_sha256(sha256)
        return self.objects_folder / sha256[:2] / sha256

    def stat(self, sha256: str) -> StoredObject | None:
        """As in `BlobStore`."""
        return _stat(self.path(sha256))

    def open(self, sha256: str, start: int = 0) -> BinaryIO:
        """As in `BlobStore`."""
        file = _open(self.path(sha256), sha256)
        file.seek(start)
        return file

    @contextmanager
    def local(self, sha256: str) -> Iterator[Path]:
        """The file itself. Its bytes are not read again here: the file system is trusted as the database is."""
        self.size(sha256)
        yield self.path(sha256)

    def link(self, sha256: str, seconds: int) -> str | None:
        """None: a folder serves nobody."""
        return None

    def remove(self, sha256: str) -> None:
        """As in `BlobStore`."""
        self.path(sha256).unlink(missing_ok=True)

    def objects(self) -> Iterator[StoredObject]:
        """As in `BlobStore`."""
        for folder in sorted(self.objects_folder.iterdir()):
            for path in sorted(folder.iterdir()):
                if (found := _stat(path)) is not None:
                    yield found

    def chunk_writer(self, stage: str, offset: int, size_bytes: int) -> BlobWriter:
        """As in `BlobStore`."""
        folder = self._stage(stage)
        try:
            growing = self._growing.take(stage, offset)
            if growing is not None:
                try:
                    return GrowingWriter(self._growing, folder, growing, growing.path, size_bytes)
                except FileNotFoundError:  # the stage was dropped, by another process too
                    pass
            return GrowingWriter(self._growing, folder, offset, self._new_path(), size_bytes)
        except OSError as error:
            raise unavailable(error) from error

    def open_staged(self, stage: str, chunk: StagedChunk) -> BinaryIO:
        """As in `BlobStore`."""
        check_sha256(chunk.sha256)
        file = _open(chunk_path(self._stage(stage), chunk.offset, chunk.sha256), chunk.sha256)
        file.seek(chunk.offset)
        return file

    def adopt_stage(
        self, stage: str, sha256: str, size_bytes: int, admit: Callable[[io.RawIOBase], None]
    ) -> StoredBlob | None:
        """As in `BlobStore`. From here on nobody writes to the file: it is taken, and not given back."""
        check_sha256(sha256)
        growing = self._growing.take(stage, size_bytes)
        if growing is None or growing.digest is None:
            return None
        if growing.digest.hexdigest() != sha256:
            raise other_bytes(sha256, growing.digest.hexdigest())
        try:
            with growing.path.open("rb", buffering=0) as file:
                admit(file)
                self._adopt(file, growing.path, sha256)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unavailable(error) from error
        return StoredBlob(sha256, size_bytes)

    def drop_stage(self, stage: str) -> None:
        """As in `BlobStore`."""
        self._growing.forget(stage)
        shutil.rmtree(self._stage(stage), ignore_errors=True)

    def stages(self) -> Iterator[tuple[str, datetime]]:
        """As in `BlobStore`. A folder changes with each chunk, which gets a name in it."""
        for folder in sorted(self.staged.iterdir()):
            try:
                yield folder.name, datetime.fromtimestamp(folder.stat().st_mtime, UTC)
            except FileNotFoundError:
                continue

    def check(self) -> None:
        """As in `BlobStore`."""
        if not os.access(self.incoming, os.W_OK | os.X_OK):
            raise DomainError(ErrorCode.UNAVAILABLE, f"{self.incoming} cannot be written")

    def _adopt(self, file: io.FileIO, path: Path, sha256: str) -> None:
        target = self.path(sha256)
        if target.exists():
            return
        os.fsync(file.fileno())
        new_folder = not target.parent.is_dir()
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        _synchronise(target.parent)
        if new_folder:
            _synchronise(target.parent.parent)

    def _stage(self, stage: str) -> Path:
        check_stage(stage)
        return self.staged / stage


def _open(path: Path, sha256: str) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise missing(sha256) from None


def _stat(path: Path) -> StoredObject | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return StoredObject(path.name, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))


def _synchronise(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
