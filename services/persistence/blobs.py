"""The store of files: a folder, content-addressed. A file is there whole and on disk, or not at all.

`<folder>/objects/<first two digits>/<sha256>` holds the bytes; `<folder>/incoming/` holds what is still being written.
A file is written there, synchronised, renamed, and then its folder is synchronised: after a power cut either the old
state or the new one is found. The same content is stored once.
"""

import hashlib
import io
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from persistence.errors import StorageError
from protocol.errors import DomainError, ErrorCode

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COPY_BYTES = 2**20


@dataclass(frozen=True)
class StoredBlob:
    """A file that is in the store."""

    sha256: str
    size: int


class BlobWriter:
    """Takes one file in pieces. Use as a context manager: leaving it without `commit` removes what was written."""

    def __init__(self, store: "FolderBlobStore", max_bytes: int | None) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._path = store.incoming / secrets.token_hex(16)
        self._file = self._path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append bytes.

        Raises:
            DomainError: BODY_TOO_LARGE before the byte that is too much is written; UNAVAILABLE when the disk is full.
        """
        size = self.size + len(chunk)
        if self._max_bytes is not None and size > self._max_bytes:
            detail = f"expected at most {self._max_bytes} bytes, at least {size} came"
            raise DomainError(ErrorCode.BODY_TOO_LARGE, detail, expected=self._max_bytes, received=size)
        view = memoryview(chunk)
        try:
            while view:  # An unbuffered write may take less than all.
                view = view[self._file.write(view) :]
        except OSError as error:
            raise _unavailable(error) from error
        self._digest.update(chunk)
        self.size = size

    def commit(self, expected_sha256: str | None = None) -> StoredBlob:
        """Make the file part of the store, durably.

        Raises:
            DomainError: DIGEST_MISMATCH, the bytes are not the ones announced; UNAVAILABLE, they cannot be stored.
        """
        sha256 = self._digest.hexdigest()
        if expected_sha256 is not None and expected_sha256 != sha256:
            detail = f"expected bytes with SHA-256 {expected_sha256}, these have {sha256}"
            raise DomainError(ErrorCode.DIGEST_MISMATCH, detail, expected=expected_sha256, received=sha256)
        try:
            self._store.adopt(self._file, self._path, sha256)
        except OSError as error:
            raise _unavailable(error) from error
        self.abort()
        return StoredBlob(sha256, self.size)

    def abort(self) -> None:
        """Forget what was written and not committed. May be called at any time, also twice."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was not committed."""
        self.abort()


class FolderBlobStore:
    """A folder as a blob store.

    Raises:
        StorageError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.objects = self.folder / "objects"
        self.incoming = self.folder / "incoming"
        probe = self.incoming / f"probe-{secrets.token_hex(8)}"
        try:
            self.objects.mkdir(parents=True, exist_ok=True)
            self.incoming.mkdir(exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            detail = error.strerror or type(error).__name__
            raise StorageError(
                f"the blob folder {self.folder} must be a folder that can be written: {detail}"
            ) from error

    def writer(self, max_bytes: int | None = None) -> BlobWriter:
        """Start to store a file of at most `max_bytes` bytes."""
        try:
            return BlobWriter(self, max_bytes)
        except OSError as error:
            raise _unavailable(error) from error

    def put_bytes(self, content: bytes) -> StoredBlob:
        """Store bytes."""
        with self.writer() as writer:
            writer.write(content)
            return writer.commit()

    def put_file(self, path: str | os.PathLike[str]) -> StoredBlob:
        """Store a copy of a file, reading it in pieces."""
        with self.writer() as writer, Path(path).open("rb") as source:
            while chunk := source.read(_COPY_BYTES):
                writer.write(chunk)
            return writer.commit()

    def path(self, sha256: str) -> Path:
        """Return where a file is or would be. Raises DomainError ARTIFACT_NOT_FOUND for what is not a SHA-256."""
        if not _SHA256.fullmatch(sha256):
            detail = f"expected 64 lower-case hexadecimal digits, got {sha256[:80]!r}"
            raise DomainError(ErrorCode.ARTIFACT_NOT_FOUND, detail, received=sha256[:80])
        return self.objects / sha256[:2] / sha256

    def exists(self, sha256: str) -> bool:
        """Return whether the store has the file."""
        return self.path(sha256).is_file()

    def size(self, sha256: str) -> int:
        """Return a file's size in bytes. Raises DomainError ARTIFACT_NOT_FOUND."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            raise _missing(sha256) from None

    def open(self, sha256: str) -> BinaryIO:
        """Open a file for reading. Raises DomainError ARTIFACT_NOT_FOUND."""
        try:
            return self.path(sha256).open("rb")
        except FileNotFoundError:
            raise _missing(sha256) from None

    def adopt(self, file: io.FileIO, path: Path, sha256: str) -> None:
        """Move a written file into place; only `BlobWriter` calls it."""
        target = self.path(sha256)
        if target.exists():
            return
        os.fsync(file.fileno())
        new_folder = not target.parent.is_dir()
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        _synchronise(target.parent)
        if new_folder:
            _synchronise(self.objects)


def _synchronise(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _missing(sha256: str) -> DomainError:
    return DomainError(ErrorCode.ARTIFACT_NOT_FOUND, f"the store has no file {sha256}", received=sha256)


def _unavailable(error: OSError) -> DomainError:
    return DomainError(ErrorCode.UNAVAILABLE, f"the file cannot be stored: {error.strerror or error}")
