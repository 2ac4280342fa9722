"""Files that are either whole or not there, whatever is killed when."""

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, durably; see `write_chunks_atomically`."""
    write_chunks_atomically(path, [content])


def write_chunks_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write `chunks`, one after the other, to `path`: after the return a power cut leaves it whole, before it the old
    file.

    A temporary file in the same folder, flushed to disk, renamed over `path`; then the folder is flushed. Missing
    parent folders are made.

    Raises:
        OSError: the folder cannot be written. No temporary file stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable. Not every system lets a folder be opened; then there is nothing to flush."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)
