"""Downloaded files by content hash. A broken download goes on where it stopped; a wrong file never gets its name."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import structlog

from edge_agent.client import CloudClient
from edge_agent.errors import CannotTrain, CloudUnavailable
from protocol.assignments import ArtifactRef, ModelManifest
from protocol.errors import ErrorCode

log = structlog.get_logger(__name__)

MODEL_SUFFIXES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja", ".md"})
"""What a model folder from the cloud may hold: no pickle, no code."""

MOST_BROKEN_DOWNLOADS = 3
"""So many times a whole file may arrive with the wrong hash before the device gives up on it."""


class ArtifactCache:
    """`files/<sha256>` and, put together from them, `models/<sha256 of the manifest>/`."""

    def __init__(self, folder: Path, retry: Callable[[str, Callable[[], None]], None]) -> None:
        """`retry(what, action)` calls `action` until the cloud answers."""
        self._files = folder / "files"
        self._models = folder / "models"
        self._retry = retry
        self._verified: set[str] = set()
        for subfolder in (self._files, self._models):
            subfolder.mkdir(parents=True, exist_ok=True)

    def fetch(self, client: CloudClient, artifact: ArtifactRef, suffix: str = "") -> Path:
        """Return the file, downloading what is missing of it. `suffix` ends its name, for readers that go by it.

        Raises:
            CannotTrain: it arrived whole but wrong, several times.
            CloudRefused: the server does not have it.
        """
        path = self._files / f"{artifact.sha256}{suffix}"
        if artifact.sha256 in self._verified and path.exists():
            return path
        # Once a process each file is read again: disks fail, and a wrong base would poison a round in silence.
        if path.exists() and _sha256(path) == artifact.sha256:
            self._verified.add(artifact.sha256)
            return path
        part = self._files / f"{artifact.sha256}.part"
        for _ in range(MOST_BROKEN_DOWNLOADS):
            self._retry("download", lambda: _download(client, artifact, part))
            if _sha256(part) == artifact.sha256:
                _make_durable(part, path)
                self._verified.add(artifact.sha256)
                return path
            log.warning("download_corrupt", sha256=artifact.sha256, size_bytes=part.stat().st_size)
            part.unlink()
        raise CannotTrain(
            ErrorCode.DIGEST_MISMATCH,
            f"artifact {artifact.sha256[:12]} came {MOST_BROKEN_DOWNLOADS} times with other bytes than its hash says",
        )

    def fetch_model(self, client: CloudClient, manifest: ArtifactRef) -> Path:
        """Return a model folder put together from the files that a manifest lists.

        Raises:
            CannotTrain: the manifest is malformed, or lists a kind of file that no model of ours needs.
        """
        folder = self._models / manifest.sha256
        listed = self.fetch_manifest(client, manifest)
        for file in listed.files:
            self.fetch(client, ArtifactRef(sha256=file.sha256, size_bytes=file.size_bytes))
        if folder.exists():
            return folder
        temporary = self._models / f"{manifest.sha256}.new"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for file in listed.files:
            _link(self._files / file.sha256, temporary / file.path)
        os.replace(temporary, folder)
        return folder

    def fetch_manifest(self, client: CloudClient, manifest: ArtifactRef) -> ModelManifest:
        """Return a manifest, without the files that it lists. Raises as `fetch_model`."""
        return self._manifest(self.fetch(client, manifest))

    def discard(self, sha256: str) -> None:
        """Drop a file that no later round can need."""
        (self._files / sha256).unlink(missing_ok=True)
        self._verified.discard(sha256)

    @staticmethod
    def _manifest(path: Path) -> ModelManifest:
        try:
            manifest = ModelManifest.model_validate(json.loads(path.read_bytes()))
        except (ValueError, RecursionError) as error:
            raise CannotTrain(ErrorCode.MODEL_FOLDER_MISSING, f"proxy manifest is malformed: {error}") from None
        if len({file.path.casefold() for file in manifest.files}) < len(manifest.files):
            # The second would be written through the first one's hard link, into another file of the cache.
            raise CannotTrain(ErrorCode.MODEL_FOLDER_MISSING, "proxy manifest lists a file name twice")
        for file in manifest.files:
            if Path(file.path).suffix not in MODEL_SUFFIXES:
                raise CannotTrain(
                    ErrorCode.MODEL_FOLDER_MISSING,
                    f"proxy manifest lists {file.path!r}; expected only {', '.join(sorted(MODEL_SUFFIXES))} files",
                )
        return manifest


def _download(client: CloudClient, artifact: ArtifactRef, part: Path) -> None:
    offset = part.stat().st_size if part.exists() else 0
    if offset > artifact.size_bytes:
        part.unlink()
        offset = 0
    if offset == artifact.size_bytes and offset > 0:
        return
    with open(part, "r+b" if part.exists() else "w+b") as file:

        def write(chunk: bytes, position: int) -> None:
            if position + len(chunk) > artifact.size_bytes:
                raise CloudUnavailable(f"artifact {artifact.sha256[:12]}: more than {artifact.size_bytes} bytes came")
            file.seek(position)
            file.write(chunk)

        if offset == 0:
            file.truncate()
        client.download(artifact.sha256, offset, write)
    received = part.stat().st_size
    if received < artifact.size_bytes:
        raise CloudUnavailable(
            f"artifact {artifact.sha256[:12]}: expected {artifact.size_bytes} bytes, got {received}",
            progressed=received > offset,
        )


def _make_durable(part: Path, path: Path) -> None:
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
