"""Folders that are there whole or not at all, through any crash."""

import os
import re
import shutil
from hashlib import sha256
from pathlib import Path

UNFINISHED = ".new"
"""Ending of a folder that is being written or taken away; one found at start is left over from a crash."""


def publish(folder: Path, target: Path) -> None:
    """Make everything in `folder` durable, then give it its name in one step."""
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent) / name)
        _sync(Path(parent))
    os.rename(folder, target)
    _sync(target.parent)


def move(folder: Path, target: Path) -> None:
    """Rename a folder that is durable already, and make the renaming durable."""
    os.rename(folder, target)
    _sync(target.parent)
    _sync(folder.parent)


def remove(folder: Path) -> None:
    """Take a folder away: it loses its name in one step, and its contents afterwards."""
    leaving = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(folder, leaving)
    _sync(folder.parent)
    shutil.rmtree(leaving)


def sweep(parent: Path) -> None:
    """Remove what a crash left unfinished in `parent`."""
    for folder in parent.glob(f"*{UNFINISHED}"):
        shutil.rmtree(folder)


def finished(parent: Path) -> list[Path]:
    """Return the whole folders in `parent`, which need not exist."""
    if not parent.is_dir():
        return []
    return [folder for folder in parent.iterdir() if not folder.name.endswith(UNFINISHED)]


def folder_name(identifier: str) -> str:
    """Return a folder name for an id that the server gave: the id itself if it is harmless, else its hash."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", identifier):
        return identifier
    return sha256(identifier.encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
