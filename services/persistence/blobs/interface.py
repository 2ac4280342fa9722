"""What every blob store can do, and what both kinds do alike: receive a file into a folder of this machine, hash it,
and only then let it into the store.

Beside the files, which are named by their hash and never change, a store has *stages*: the chunks of one upload that
is under way. A stage is dropped as a whole, or becomes a file.
"""

import hashlib
import io
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from persistence.errors import StorageError
from protocol.errors import DomainError, ErrorCode

_SHA256 = re.compile(r"[0-9a-f]{64}")
_STAGE = re.compile(r"[A-Za-z0-9_-]{1,64}")
COPY_BYTES = 2**20


@dataclass(frozen=True)
class StoredBlob:
    """A file that is in the store."""

    sha256: str
    size: int


@dataclass(frozen=True)
class StagedChunk:
    """A chunk of an upload: where it starts in the file, its size in bytes and its hash."""

    offset: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredObject:
    """A file as a listing of the store shows it."""

    sha256: str
    size: int
    modified: datetime


Adopt = Callable[[io.FileIO, Path, str], None]
"""Moves a written file, of the hash that is given, to its place in the store."""


class BlobWriter:
    """Takes one file in pieces. Use as a context manager: leaving it without `commit` removes what was written."""

    def __init__(self, path: Path, max_bytes: int | None, adopt: Adopt) -> None:
        self._max_bytes = max_bytes
        self._adopt = adopt
        self._path = path
        self._file = self._open(path)
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
            raise unavailable(error) from error
        self._digest.update(chunk)
        self.size = size

    def commit(self, expected_sha256: str | None = None) -> StoredBlob:
        """Make the file part of the store, durably.

        Raises:
            DomainError: DIGEST_MISMATCH, the bytes are not the ones announced; UNAVAILABLE, they cannot be stored.
        """
        sha256 = self._digest.hexdigest()
        if expected_sha256 is not None and expected_sha256 != sha256:
            raise other_bytes(expected_sha256, sha256)
        try:
            self._adopt(self._file, self._path, sha256)
        except OSError as error:
            raise unavailable(error) from error
        self.abort()
        return StoredBlob(sha256, self.size)

    def _open(self, path: Path) -> io.FileIO:
        return path.open("x+b", buffering=0)

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


class BlobStore(ABC):
    """Files by their SHA-256.

    Everywhere, ARTIFACT_NOT_FOUND is raised for what is not there and for what is not a hash, and UNAVAILABLE when the
    store does not answer or takes no more; both are `DomainError`s.

    Args:
        incoming: a folder of this machine for what is being written.

    Raises:
        StorageError: the folder cannot be made or written to.
    """

    def __init__(self, incoming: Path) -> None:
        self.incoming = incoming
        probe = incoming / f"probe-{secrets.token_hex(8)}"
        try:
            incoming.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise StorageError(
                f"the blob folder {incoming.parent} must be a folder that can be written: {reason}"
            ) from error

    def writer(self, max_bytes: int | None = None) -> BlobWriter:
        """Start to store a file of at most `max_bytes` bytes."""
        try:
            return BlobWriter(self._new_path(), max_bytes, self._adopt)
        except OSError as error:
            raise unavailable(error) from error

    def put_bytes(self, content: bytes) -> StoredBlob:
        """Store bytes."""
        with self.writer() as writer:
            writer.write(content)
            return writer.commit()

    def put_file(self, path: str | os.PathLike[str]) -> StoredBlob:
        """Store a copy of a file, reading it in pieces."""
        with self.writer() as writer, Path(path).open("rb") as source:
            while chunk := source.read(COPY_BYTES):
                writer.write(chunk)
            return writer.commit()

    def exists(self, sha256: str) -> bool:
        """Return whether the store has the file."""
        return self.stat(sha256) is not None

    def size(self, sha256: str) -> int:
        """Return a file's size in bytes."""
        found = self.stat(sha256)
        if found is None:
            raise missing(sha256)
        return found.size

    def remove_unfinished(self, before: datetime) -> int:
        """Remove what was being written and has not been touched since `before`; return how many files."""
        removed = 0
        for path in self.incoming.iterdir():
            try:
                if path.stat().st_mtime < before.timestamp():
                    path.unlink()
                    removed += 1
            except FileNotFoundError:  # its writer has just ended
                continue
        return removed

    @abstractmethod
    def stat(self, sha256: str) -> StoredObject | None:
        """Return what the store knows of a file, None if it is not there."""

    @abstractmethod
    def open(self, sha256: str, start: int = 0) -> BinaryIO:
        """Open a file for reading from byte `start` on, which lies inside the file unless it is 0."""

    @abstractmethod
    def local(self, sha256: str) -> AbstractContextManager[Path]:
        """Give a file's bytes as a file of this machine, for as long as the context lasts. It must not be changed.

        Raises:
            DomainError: DIGEST_MISMATCH, the store gave other bytes.
        """

    @abstractmethod
    def link(self, sha256: str, seconds: int) -> str | None:
        """Return a URL from which anybody may read the file for so long; None where the store has no such thing."""

    @abstractmethod
    def remove(self, sha256: str) -> None:
        """Remove a file. Only for what nothing refers to; see `persistence.orphans`."""

    @abstractmethod
    def objects(self) -> Iterator[StoredObject]:
        """Yield every file, in the order of the hashes."""

    @abstractmethod
    def chunk_writer(self, stage: str, offset: int, size_bytes: int) -> BlobWriter:
        """Start to stage the chunk of an upload that starts at `offset` of its file and has `size_bytes` bytes."""

    @abstractmethod
    def open_staged(self, stage: str, chunk: StagedChunk) -> BinaryIO:
        """Open the file of a chunk of an upload where the chunk starts; the bytes after its end mean nothing."""

    @abstractmethod
    def adopt_stage(
        self, stage: str, sha256: str, size_bytes: int, admit: Callable[[io.RawIOBase], None]
    ) -> StoredBlob | None:
        """Make the chunks of an upload a file of the store, durably, if that needs no copy; else return None.

        It needs none where this very process took every chunk of the file, one after the other.

        Args:
            admit: is given the file, whose hash is right, to read; what it raises keeps the file out of the store.

        Raises:
            DomainError: DIGEST_MISMATCH, the chunks make another file than `sha256`; UNAVAILABLE.
        """

    @abstractmethod
    def drop_stage(self, stage: str) -> None:
        """Remove every chunk of an upload. Again: no change."""

    @abstractmethod
    def stages(self) -> Iterator[tuple[str, datetime]]:
        """Yield each upload that has chunks, with the time of the newest of them."""

    @abstractmethod
    def check(self) -> None:
        """Raise DomainError UNAVAILABLE if the store cannot be written to now."""

    @abstractmethod
    def _adopt(self, file: io.FileIO, path: Path, sha256: str) -> None:
        """Move a written file into the store, durably and in one step. What is there already stays."""

    def _new_path(self) -> Path:
        return self.incoming / secrets.token_hex(16)


def check_sha256(sha256: str) -> None:
    """Raise DomainError ARTIFACT_NOT_FOUND for what is not a SHA-256: it will become part of a path."""
    if not _SHA256.fullmatch(sha256):
        detail = f"expected 64 lower-case hexadecimal digits, got {sha256[:80]!r}"
        raise DomainError(ErrorCode.ARTIFACT_NOT_FOUND, detail, received=sha256[:80])


def check_stage(stage: str) -> None:
    """Raise ValueError for what cannot name a stage: it will become part of a path."""
    if not _STAGE.fullmatch(stage):
        raise ValueError(f"expected 1 to 64 letters, digits, `_` and `-`, got {stage[:80]!r}")


def missing(sha256: str) -> DomainError:
    """The error for a file that is not there."""
    return DomainError(ErrorCode.ARTIFACT_NOT_FOUND, f"the store has no file {sha256}", received=sha256)


def other_bytes(expected: str, received: str) -> DomainError:
    """The error for bytes that are not the ones announced; both are hashes."""
    detail = f"expected bytes with SHA-256 {expected}, these have {received}"
    return DomainError(ErrorCode.DIGEST_MISMATCH, detail, expected=expected, received=received)


def unavailable(error: OSError) -> DomainError:
    """The error for a file that cannot be stored."""
    return DomainError(ErrorCode.UNAVAILABLE, f"the file cannot be stored: {error.strerror or error}")
