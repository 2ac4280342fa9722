"""Answers with a file of the blob store, or the range of it that is wanted, and counts what was sent.

The file is read in threads, piece by piece: memory does not grow with the file, and the event loop never waits for the
disk.
"""

import asyncio
from dataclasses import dataclass
from typing import BinaryIO

import anyio
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from cloud_api.artifacts.ranges import ByteRange, any_matches, parse_range
from cloud_api.cloud import Cloud
from cloud_api.threads import in_thread
from persistence import traffic
from persistence.artifacts import Artifact
from protocol.headers import CONTENT_DIGEST_HEADER, REPR_DIGEST_HEADER, content_digest


@dataclass(frozen=True)
class Wanted:
    """The conditional and range headers of a request, None where absent, and what the client can do."""

    range: str | None = None
    if_range: str | None = None
    if_none_match: str | None = None
    link: bool = False
    """The client can fetch the file from another host."""


async def file_response(
    request: Request, cloud: Cloud, artifact: Artifact, wanted: Wanted, *, device_id: str | None = None
) -> Response:
    """Return the answer for a file: whole (200), a range (206), not changed (304) or where it is (307).

    Args:
        device_id: whose traffic it is; None counts nothing.

    Raises:
        RangeNotSatisfiable: 416.
        DomainError: ARTIFACT_NOT_FOUND, the store has lost it.
    """
    size = await in_thread(cloud.blobs.size, artifact.sha256)
    etag = f'"{artifact.sha256}"'
    digest = content_digest(artifact.sha256)
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        REPR_DIGEST_HEADER: digest,
    }
    if wanted.if_none_match is not None and any_matches(wanted.if_none_match, etag):
        return Response(status_code=304, headers=headers)
    if wanted.link and (link := await _link(cloud, artifact)) is not None:
        # Counted as sent whole: what the other host sends is not seen here.
        await _count(cloud, artifact, device_id, size)
        return Response(status_code=307, headers=headers | {"Location": link, "Cache-Control": "no-store"})
    part = None
    if wanted.range is not None and wanted.if_range in {None, etag}:
        part = parse_range(wanted.range, size)
    if part is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
    elif request.method == "GET":
        # RFC 9530: of this message's content, so not of a range and not for HEAD; `Repr-Digest` is of the whole file.
        headers[CONTENT_DIGEST_HEADER] = digest
    headers["Content-Type"] = "application/octet-stream"
    return _FileResponse(
        cloud,
        artifact,
        part or ByteRange(0, size),
        status_code=200 if part is None else 206,
        headers=headers,
        device_id=device_id,
    )


class _FileResponse(Response):
    """Streams the bytes of a range; sends only the headers for HEAD."""

    def __init__(
        self,
        cloud: Cloud,
        artifact: Artifact,
        part: ByteRange,
        *,
        status_code: int,
        headers: dict[str, str],
        device_id: str | None,
    ) -> None:
        super().__init__(status_code=status_code, headers=headers | {"Content-Length": str(part.size)})
        self._cloud = cloud
        self._artifact = artifact
        self._part = part
        self._device_id = device_id
        self._sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send."""
        if scope["method"] == "HEAD":
            await super().__call__(scope, receive, send)
            return
        try:
            with self._cloud.transfers.one():
                await self._stream(receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await _count(self._cloud, self._artifact, self._device_id, self._sent)

    async def _stream(self, receive: Receive, send: Send) -> None:
        file, chunk = await in_thread(self._open)
        # One task for the whole file: to ask before each chunk cost more than to send it.
        hung_up = asyncio.ensure_future(_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while chunk and not hung_up.done():
                self._sent += len(chunk)
                more = self._sent < self._part.size
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
                chunk = b""  # or it would be held while the next is read, or this waits for its turn to be counted
                if more:
                    chunk = await in_thread(self._read, file)
            if self._part.size == 0:
                await send({"type": "http.response.body", "body": b""})
        finally:
            hung_up.cancel()
            file.close()

    def _open(self) -> tuple[BinaryIO, bytes]:
        """Open the file and read its first bytes."""
        file = self._cloud.blobs.open(self._artifact.sha256, self._part.start)
        try:
            return file, self._read(file)
        except BaseException:
            file.close()
            raise

    def _read(self, file: BinaryIO) -> bytes:
        """Read the next bytes of what is to be sent; none at its end."""
        left = self._part.size - self._sent
        chunk = file.read(min(self._cloud.transfers.block_bytes, left))
        if left and not chunk:
            raise EOFError(f"a stored file is {left} bytes shorter than it was")
        return chunk


async def _disconnect(receive: Receive) -> None:
    """Return when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def _link(cloud: Cloud, artifact: Artifact) -> str | None:
    seconds = cloud.settings.link_seconds
    return await in_thread(cloud.blobs.link, artifact.sha256, seconds) if seconds else None


async def _count(cloud: Cloud, artifact: Artifact, device_id: str | None, num_bytes: int) -> None:
    if device_id is not None and num_bytes > 0:
        await cloud.write(
            lambda session: traffic.add(session, artifact.run_id, device_id, "down", artifact.kind, num_bytes),
            durable=False,
        )
