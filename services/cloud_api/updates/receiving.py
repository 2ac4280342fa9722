"""Takes a file's bytes from the network into the blob store: bounded before it is read, checked while it comes.

Memory does not grow with the file. Nothing is kept of a file that is cut, too long, wrong or late.
"""

import asyncio
import io
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from fastapi import Request
from starlette.requests import ClientDisconnect

from cloud_api.cloud import Cloud
from cloud_api.threads import in_thread
from cloud_api.transfers import Transfers
from cloud_api.updates.admission import HeaderGate
from persistence.blobs import BlobWriter, StoredBlob
from persistence.part_uploads import ReceivedFile
from persistence.updates import PartAdmission
from protocol.errors import DomainError, ErrorCode
from protocol.headers import CONTENT_DIGEST_HEADER, parse_content_digest
from protocol.statuses import PartKind

COPY_BYTES = 256 * 1024
"""Copied at once where a file is put together."""

HEADER_BLOCK_BYTES = 16 * 1024
"""Read at once of a file of which only the header is looked at."""


@dataclass(frozen=True)
class Announced:
    """What a request's headers say about its body."""

    size_bytes: int
    sha256: str


def announced(
    request: Request, limit: int, *, length_header: str = "Content-Length", digest_header: str = CONTENT_DIGEST_HEADER
) -> Announced:
    """Read the size and the digest of what will come, both required: of this body, or of a file that comes in chunks.

    Raises:
        DomainError: LENGTH_REQUIRED, BODY_TOO_LARGE, or INVALID_FIELD for the digest.
    """
    length = request.headers.get(length_header, "")
    if not (length.isascii() and length.isdigit()):
        detail = f"expected `{length_header}` with the size in bytes; a body without its length is not taken"
        raise DomainError(ErrorCode.LENGTH_REQUIRED, detail)
    if len(length) > 18 or int(length) > limit:
        detail = f"expected at most {limit} bytes, `{length_header}` says {length[:40]}"
        raise DomainError(ErrorCode.BODY_TOO_LARGE, detail, expected=limit, received=length[:40])
    digest = request.headers.get(digest_header, "")
    try:
        return Announced(int(length), parse_content_digest(digest))
    except ValueError as error:
        detail = f"`{digest_header}`: {error}"
        raise DomainError(
            ErrorCode.INVALID_FIELD, detail, expected="sha-256=:<base64 of 32 bytes>:", received=digest[:120] or None
        ) from None


def most_bytes(cloud: Cloud, kind: PartKind, admission: PartAdmission) -> int:
    """Return the largest size that is taken for a part."""
    limit = cloud.settings.upload_limits[kind]
    return limit if admission.most_bytes is None else min(limit, admission.most_bytes)


async def receive_file(request: Request, cloud: Cloud, body: Announced, gate: HeaderGate) -> StoredBlob:
    """Store the request's body durably and return what was stored.

    Raises:
        DomainError: TRUNCATED_BODY, DIGEST_MISMATCH, UNAVAILABLE (the disk is full), or what the gate refuses.
    """

    def finish(writer: BlobWriter) -> StoredBlob:
        gate.finish()
        return writer.commit(body.sha256)

    return await _receive(request, cloud, body, gate, partial(cloud.blobs.writer, body.size_bytes), finish)


async def receive_chunk(  # noqa: PLR0917
    request: Request, cloud: Cloud, body: Announced, gate: HeaderGate | None, upload_id: str, offset: int
) -> StoredBlob:
    """Stage the request's body as the chunk of an upload that starts at `offset`. Raises as `receive_file`.

    Args:
        gate: looks at the bytes, and need not be passed by their end; None for a chunk that holds nothing of a header.
    """
    writer = partial(cloud.blobs.chunk_writer, upload_id, offset, body.size_bytes)
    return await _receive(request, cloud, body, gate, writer, lambda opened: opened.commit(body.sha256))


async def _receive(  # noqa: PLR0917
    request: Request,
    cloud: Cloud,
    body: Announced,
    gate: HeaderGate | None,
    writer: Callable[[], BlobWriter],
    finish: Callable[[BlobWriter], StoredBlob],
) -> StoredBlob:
    """Write the body, each block in a thread; the writer is opened with the first, and finished with the last."""
    opened: BlobWriter | None = None

    def take(block: bytes, *, last: bool) -> StoredBlob | None:
        nonlocal opened
        opened = opened or writer()
        if gate is not None:
            gate.take(block)
        opened.write(block)
        return finish(opened) if last else None

    seconds = cloud.settings.upload_idle_seconds
    stored = None
    try:
        with cloud.transfers.one():
            async with aclosing(_blocks(request, body.size_bytes, seconds, cloud.transfers)) as blocks:
                async for block, last in blocks:
                    stored = await in_thread(take, block, last=last)
                    del block  # or it would lie here while the next one gathers
    finally:
        if opened is not None:
            opened.abort()
    assert stored is not None
    return stored


def adopt(cloud: Cloud, upload_id: str, file: Announced, gate: HeaderGate) -> StoredBlob | None:
    """Make a file of its chunks without a copy, where the store can: see `BlobStore.adopt_stage`. For a thread.

    Only its header is read.

    Raises:
        DomainError: DIGEST_MISMATCH, what the gate refuses, UNAVAILABLE.
    """

    def admit(stream: io.RawIOBase) -> None:
        while not gate.passed and (block := stream.read(HEADER_BLOCK_BYTES)):
            gate.take(block)
        gate.finish()

    return cloud.blobs.adopt_stage(upload_id, file.sha256, file.size_bytes, admit)


def assemble(cloud: Cloud, upload_id: str, file: ReceivedFile, gate: HeaderGate) -> StoredBlob:
    """Put a file together by copying its chunks. For a thread.

    Raises:
        DomainError: DIGEST_MISMATCH, what the gate refuses, ARTIFACT_NOT_FOUND (a chunk was lost, or the upload was
            ended meanwhile), UNAVAILABLE.
    """
    with cloud.blobs.writer(file.size_bytes) as writer:
        for chunk in file.chunks:
            left = chunk.size_bytes
            with cloud.blobs.open_staged(upload_id, chunk) as stream:
                while block := stream.read(min(COPY_BYTES, left)):
                    left -= len(block)
                    gate.take(block)
                    writer.write(block)
        gate.finish()
        return writer.commit(file.sha256)


async def _blocks(
    request: Request, size_bytes: int, idle_seconds: float, transfers: Transfers
) -> AsyncGenerator[tuple[bytes, bool]]:
    """Yield the body in blocks of at least `transfers.block_bytes`, but for the last, and of each whether it is that.

    The last one comes only when all has come.
    """
    waiting: list[bytes] = []
    size = received = 0
    chunks = request.stream()
    loop = asyncio.get_running_loop()
    ended = False
    try:
        while not ended:
            # One for each block and not for each of its pieces; while they come it is put off, now and then.
            put_off = loop.time()
            async with asyncio.timeout_at(put_off + idle_seconds) as limit:
                # All that was announced is here: only what says that it ends is missing.
                while not ended and (size < transfers.block_bytes or received == size_bytes):
                    chunk = await anext(chunks, b"")
                    ended = not chunk
                    waiting.append(chunk)
                    size += len(chunk)
                    received += len(chunk)
                    if loop.time() - put_off > idle_seconds / 8:
                        put_off = loop.time()
                        limit.reschedule(put_off + idle_seconds)
            if not ended:
                yield _taken(waiting), False
                size = 0
    except ClientDisconnect:
        raise _truncated(size_bytes, received, "then the connection was closed") from None
    except TimeoutError:
        raise _truncated(size_bytes, received, f"then nothing for {idle_seconds:.0f} s") from None
    finally:
        await chunks.aclose()
    if received < size_bytes:
        raise _truncated(size_bytes, received, "then the body ended")
    yield _taken(waiting), True


def _taken(pieces: list[bytes]) -> bytes:
    """Put pieces together and let go of them: whoever works on the block should not hold its bytes twice."""
    block = b"".join(pieces)
    pieces.clear()
    return block


def _truncated(expected: int, received: int, what: str) -> DomainError:
    detail = f"`Content-Length` says {expected} bytes; {received} came, {what}. Nothing was kept"
    return DomainError(ErrorCode.TRUNCATED_BODY, detail, expected=expected, received=received)
