"""Sends a file of an update: at once if it is small, else in chunks, of which none is sent again that has arrived.

A tokenizer, which is the same in every round, is asked about first: the server may have it from an earlier one.

What has arrived the server knows: nothing is remembered here, so a restart changes nothing.
"""

from pathlib import Path

from edge_agent.client import CloudClient
from edge_agent.errors import CloudUnavailable
from protocol.assignments import Assignment, Part, PartReceipt
from protocol.statuses import PartKind

AT_ONCE_BYTES = 4 * 2**20
"""A file of up to so many bytes is sent in one request: more requests would not save what a cut costs."""

CHUNK_BYTES = 8 * 2**20
"""Of the first chunk where it begins the upload, and so of each that follows; the most that a server takes. A smaller
one would save more at a cut, and cost a request, a commit and some hashing for each."""

LARGEST_CHUNK_BYTES = 64 * 2**20
"""A chunk is held in memory, so a server cannot ask for larger ones."""


def upload_file(
    client: CloudClient,
    assignment: Assignment,
    part: Part,
    file: Path,
    *,
    fresh: bool = False,
    at_once_bytes: int = AT_ONCE_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> PartReceipt:
    """Send a file, or what the server lacks of it.

    Args:
        fresh: it was never tried before, so nothing of it is there: the first chunk goes without asking.

    Raises:
        CloudUnavailable: it broke off; `progressed` says whether a chunk arrived. Call again, not fresh.
        CloudRefused: the server does not want it.
    """
    asks = part.kind is PartKind.SLM_VOCABULARY
    if part.size_bytes <= at_once_bytes and not asks:
        return client.upload_part(assignment, part, file)
    fresh = fresh and not asks
    with open(file, "rb") as stream:
        upload = client.begin_upload(assignment, part, stream.read(chunk_bytes) if fresh else b"")
        begun_at = 0 if fresh else upload.received_bytes
        try:
            while upload.receipt is None and upload.received_bytes < part.size_bytes:
                offset, upload_id = upload.received_bytes, upload.upload_id
                if upload_id is None or not 1 <= upload.chunk_bytes <= LARGEST_CHUNK_BYTES:
                    raise CloudUnavailable(
                        f"expected an upload with chunks of 1 to {LARGEST_CHUNK_BYTES} bytes, got {upload.chunk_bytes}"
                    )
                stream.seek(offset)
                upload = client.send_chunk(assignment, part, upload_id, offset, stream.read(upload.chunk_bytes))
                if upload.received_bytes <= offset:
                    raise CloudUnavailable(f"a chunk was sent from byte {offset} on, and {offset} bytes are there")
            if upload.receipt is not None:
                return upload.receipt
            return client.complete_upload(assignment, part, upload.upload_id or "")
        except CloudUnavailable as error:
            error.progressed = error.progressed or upload.received_bytes > begun_at
            raise
