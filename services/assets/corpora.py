"""Plain text for pretraining: a UTF-8 file, as it is or compressed, whose documents blank lines divide."""

import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from assets.errors import DataFileError

_OPENED: Mapping[str, tuple[str, Callable[[bytes], bytes]]] = {
    ".gz": ("gzipped", gzip.decompress),
    ".xz": ("xz-compressed", lzma.decompress),
}
_PACKED: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".xz": lambda content: lzma.compress(content, preset=1),
}
_BLANK_LINES = re.compile(r"\n\s*\n")


def read_documents(path: Path, *, max_bytes: int | None = None) -> list[str]:
    """Read a corpus's documents.

    Args:
        path: `.gz` and `.xz` are unpacked, anything else is read as it is.
        max_bytes: At most about so many bytes, in documents taken evenly from the whole corpus; None: all.

    Raises:
        DataFileError: there is no such file, it is not UTF-8, its compression is broken, or it holds no text.
    """
    kind, unpack = _OPENED.get(path.suffix, ("", bytes))
    expected = f"{path}: expected {kind} UTF-8 text".replace("  ", " ")
    if not path.is_file():
        raise DataFileError(f"{expected}, found {'a folder' if path.exists() else 'nothing'} there")
    try:
        text = unpack(path.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataFileError(f"{expected}, got: {error}") from None
    documents = [each for each in _BLANK_LINES.split(text.strip()) if each.strip()]
    if not documents:
        raise DataFileError(f"{expected}, got {path.stat().st_size} bytes without a word")
    return documents if max_bytes is None else documents[:: max(1, -(-len(text) // max_bytes))]


def write_documents(path: Path, documents: Sequence[str]) -> None:
    """Write a corpus that `read_documents` reads; the same documents make the same bytes.

    Args:
        path: its suffix says how it is compressed.
        documents: none with a blank line inside.
    """
    path.write_bytes(_PACKED.get(path.suffix, bytes)("\n\n".join(documents).encode()))
