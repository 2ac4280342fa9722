"""An adapter as peft reads it: a tar archive of `adapter_model.safetensors`, `adapter_config.json` and a README.

The archive is written while it is sent: the adapter goes from the blob store to the client piece by piece.
"""

import json
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import Response
from starlette.responses import StreamingResponse

from cloud_api.cloud import Cloud
from cloud_api.threads import in_thread
from cloud_api.versions.model_card import CardFacts, folder_name, model_card
from protocol.errors import DomainError, ErrorCode
from protocol.headers import PEFT

_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Package:
    """What goes into an archive: small files by name, and one file of the blob store."""

    folder: str
    modified: int
    """Seconds since 1970, of every file."""
    small: dict[str, bytes]
    adapter_sha256: str


def adapter_package(facts: CardFacts, adapter: str) -> Package:
    """Return the package of a version's adapter, `llm` or `proxy`.

    Raises:
        DomainError: ARTIFACT_NOT_FOUND, there is no such adapter; or the run was prepared before its peft settings
            were kept.
    """
    version = facts.version
    sha256 = version.proxy_adapter_sha256 if adapter == "proxy" else version.llm_adapter_sha256
    config = (facts.start.metrics.get(PEFT) or {}).get(adapter)
    if sha256 is None or config is None:
        detail = f"version {version.number} of run {version.run_id} has no {adapter} adapter with peft settings"
        raise DomainError(ErrorCode.ARTIFACT_NOT_FOUND, detail, received=adapter)
    base = facts.run.config.llm if adapter == "llm" else facts.run.config.slm
    if base is not None:
        config = {**config, "base_model_name_or_path": base}
    small = {
        "README.md": model_card(facts).encode(),
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    return Package(folder_name(version, adapter), int(version.created_at.timestamp()), small, sha256)


async def package_response(cloud: Cloud, package: Package) -> Response:
    """Return the archive as an answer. Raises DomainError ARTIFACT_NOT_FOUND, the store has lost the adapter."""
    adapter_size = await in_thread(cloud.blobs.size, package.adapter_sha256)
    sizes = [*(len(content) for content in package.small.values()), adapter_size]
    length = sum(tarfile.BLOCKSIZE + size + _padding(size) for size in sizes) + len(_END)
    headers = {
        "Content-Length": str(length),
        "Content-Disposition": f'attachment; filename="{package.folder}.tar"',
        "Cache-Control": "private, no-cache",
    }
    return StreamingResponse(_archive(cloud, package, adapter_size), media_type="application/x-tar", headers=headers)


async def _archive(cloud: Cloud, package: Package, adapter_size: int) -> AsyncIterator[bytes]:
    for name, content in package.small.items():
        yield _header(package, name, len(content)) + content + bytes(_padding(len(content)))
    yield _header(package, "adapter_model.safetensors", adapter_size)
    file = await in_thread(cloud.blobs.open, package.adapter_sha256)
    try:
        with cloud.transfers.one():
            while chunk := await in_thread(file.read, cloud.transfers.block_bytes):
                yield chunk
    finally:
        file.close()
    yield bytes(_padding(adapter_size)) + _END


def _header(package: Package, name: str, size: int) -> bytes:
    info = tarfile.TarInfo(f"{package.folder}/{name}")
    info.size, info.mtime, info.mode = size, package.modified, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
