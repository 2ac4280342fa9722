"""A packed adapter onto the disk: the whole folder, or none of it."""

import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pydantic import BaseModel

from command_line.errors import BadInput, Unreachable


class Pulled(BaseModel):
    """An adapter's folder on this machine."""

    folder: str
    files: dict[str, int]
    """Name -> bytes."""


def pull_package(folder: Path, download: Callable[[BinaryIO], None], *, next_option: str) -> Pulled:
    """Unpack what `download` writes, a tar archive of one folder of files, as `folder`.

    The files come into a folder beside it, which gets its name once all are there.

    Args:
        folder: Must not be there yet, or be empty.
        next_option: The option that names another folder, for the message.

    Raises:
        BadInput: the folder is there and has files, or cannot be written.
        Unreachable: what came is not such an archive.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(
            f"expected no folder {folder}, or an empty one, got one with files",
            next_step=f"name another one with {next_option}",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            with tempfile.TemporaryFile(dir=beside) as archive:
                download(archive)
                archive.seek(0)
                files = _unpack(archive, Path(beside) / "files")
            (Path(beside) / "files").replace(folder)
    except OSError as error:
        raise BadInput(
            f"cannot write {folder}: {error.strerror or error}", next_step=f"name another one with {next_option}"
        ) from None
    return Pulled(folder=str(folder), files=files)


def _unpack(archive: BinaryIO, folder: Path) -> dict[str, int]:
    """Write the files of an archive; nothing that it holds can lie elsewhere than directly in `folder`."""
    folder.mkdir()
    files: dict[str, int] = {}
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                source = tar.extractfile(member) if member.isreg() else None
                if source is None or len(parts) != 2 or ".." in parts:
                    raise Unreachable(f"expected an archive of one folder of files, got {member.name!r} in it")
                with open(folder / parts[1], "xb") as target:
                    shutil.copyfileobj(source, target)
                    target.flush()
                    os.fsync(target.fileno())
                files[parts[1]] = member.size
    except tarfile.TarError as error:
        raise Unreachable(f"expected an archive of one folder of files, got: {error}") from None
    return files
