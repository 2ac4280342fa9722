"""Chunks of uploads in a folder: one file that grows, so that a file which has come whole needs not be written again.

A chunk lies where it belongs in its file: the one that starts at byte n starts at byte n of
`staged/<upload>/<n>-<sha256>`. The process that took the chunks before appends to their file and gives it one more name
(a hard link), in one step, when the chunk's hash was right. The last name is then the whole file, to be renamed into
the store. With the file goes the state of its SHA-256, so that nothing is read again.

Who may write is never a question: a process appends only to files that it began, and whoever appends has taken the file
out of `GrowingFiles`, so that a second sender of the same chunk finds none and begins a file of its own, with a hole in
front. So does any other process, and the same one after a restart. Each chunk is whole and at its place all the same;
what takes longer then is that the file is put together by copying. Bytes after the last chunk's end are of no meaning.
"""

import io
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persistence.blobs.interface import BlobWriter

MOST_GROWING = 4096
"""Uploads that a process remembers, some hundred bytes each; one that is forgotten goes on in a file of its own."""


@dataclass(frozen=True)
class GrowingFile:
    """A file of chunks that this process began. `path` is the name of its last chunk, `end` where that ends."""

    path: Path
    end: int
    digest: Any
    """`hashlib.sha256` of all up to `end`; None: it did not begin with the first chunk."""


class GrowingFiles:
    """The files of chunks of this process, by upload. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, GrowingFile] = OrderedDict()

    def take(self, stage: str, end: int) -> GrowingFile | None:
        """Take out the upload's file, if it is there and ends at `end`. Only who has taken it may write to it."""
        with self._lock:
            found = self._files.get(stage)
            return self._files.pop(stage) if found is not None and found.end == end else None

    def give(self, stage: str, file: GrowingFile) -> None:
        """Put an upload's file in, or back. Of two, the one that has come farther stays."""
        with self._lock:
            other = self._files.get(stage)
            if other is None or other.end < file.end:
                self._files[stage] = file
                self._files.move_to_end(stage)
            if len(self._files) > MOST_GROWING:
                self._files.popitem(last=False)

    def forget(self, stage: str) -> None:
        """Forget an upload's file. Again: no change."""
        with self._lock:
            self._files.pop(stage, None)


def chunk_path(folder: Path, offset: int, sha256: str) -> Path:
    """Return where the chunk at `offset` is or would be in a stage's folder."""
    return folder / f"{offset}-{sha256}"


class GrowingWriter(BlobWriter):
    """Takes one chunk.

    Args:
        folder: the stage's.
        place: the file that the chunk goes on with, which the caller has taken; or the offset of one that begins anew.
        path: of the file; a new one is made.

    Raises:
        FileNotFoundError: the file that it goes on with is gone.
    """

    def __init__(
        self, files: GrowingFiles, folder: Path, place: GrowingFile | int, path: Path, size_bytes: int
    ) -> None:
        self._files = files
        self._folder = folder
        self._before = place if isinstance(place, GrowingFile) else None
        self._offset = place.end if isinstance(place, GrowingFile) else place
        self._whole = None if self._before is None or self._before.digest is None else self._before.digest.copy()
        self._ended = False
        super().__init__(path, size_bytes, self._name)
        self._file.seek(self._offset)

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """As `BlobWriter.write`."""
        super().write(chunk)
        if self._whole is not None:
            self._whole.update(chunk)

    def abort(self) -> None:
        """As `BlobWriter.abort`; what was there before the chunk is given back."""
        if self._ended:
            return
        self._ended = True
        if self._before is None:
            super().abort()
            return
        try:
            self._file.truncate(self._offset)
        finally:
            self._file.close()
        self._files.give(self._folder.name, self._before)

    def _open(self, path: Path) -> io.FileIO:
        return super()._open(path) if self._before is None else path.open("r+b", buffering=0)

    def _name(self, _file: io.FileIO, path: Path, sha256: str) -> None:
        # Not synchronised: a kill loses nothing, and a power cut only chunks that the whole file's hash gives away.
        target = chunk_path(self._folder, self._offset, sha256)
        self._folder.mkdir(exist_ok=True)
        try:
            os.link(path, target)
        except FileExistsError:  # another sender was quicker
            return
        if self._before is None:
            path.unlink()
            self._whole = self._digest.copy() if self._offset == 0 else None
        self._ended = True
        self._file.close()
        self._files.give(self._folder.name, GrowingFile(target, self._offset + self.size, self._whole))
