"""Receives a part in chunks: begins, takes each chunk, and completes the file with the last one.

A request holds no transaction while its bytes come. Each has two: one that admits, which mostly writes nothing, and one
that records what came. The last chunk of a file needs no record of its own where the store can adopt the chunks as they
lie: then the receipt is the record.

The receipt is durable before the device has it. The record of a chunk outlives a kill, and not a power cut, which may
also take the chunk: a device that asks learns what is there, and the whole file's hash tells what is not.
"""

from dataclasses import dataclass
from datetime import datetime

from fastapi import Request
from sqlalchemy.orm import Session

from cloud_api.authentication import Presented, authenticate_device, recognise_device
from cloud_api.cloud import Cloud
from cloud_api.settings import LARGEST_CHUNK
from cloud_api.threads import in_thread
from cloud_api.updates.admission import HeaderGate
from cloud_api.updates.admitting import admitted
from cloud_api.updates.receiving import Announced, adopt, announced, assemble, most_bytes, receive_chunk
from persistence import assignments, part_uploads, traffic, updates
from persistence.blobs import StoredBlob
from persistence.part_uploads import FirstChunk, ReceivedFile, UploadPlace
from persistence.updates import PartAdmission
from protocol.assignments import PartReceipt, PartUpload
from protocol.errors import DomainError, ErrorCode
from protocol.headers import REPR_DIGEST_HEADER, UPLOAD_LENGTH_HEADER
from protocol.statuses import PartKind

_WRONG_FILE = frozenset(
    {
        ErrorCode.DIGEST_MISMATCH,
        ErrorCode.NOT_SAFETENSORS,
        ErrorCode.WRONG_BASE_VERSION,
        ErrorCode.WRONG_TENSOR_NAMES,
        ErrorCode.WRONG_TENSOR_SHAPE,
        ErrorCode.WRONG_TENSOR_DTYPE,
        ErrorCode.LOGITS_MISMATCH,
        ErrorCode.MESSAGE_MISMATCH,
    }
)
"""What no further chunk can mend."""


@dataclass(frozen=True)
class ChunkedPart:
    """A part of an assignment, and the request that is about it."""

    cloud: Cloud
    presented: Presented
    assignment_id: str
    kind: PartKind

    async def begin(self, request: Request) -> tuple[PartUpload, bool]:
        """Begin, or say how far the file has come. A body is the file's first chunk; it is not read if that is there.

        Returns:
            The upload, and whether nothing of it was there before.

        Raises:
            DomainError: LENGTH_REQUIRED, BODY_TOO_LARGE, INVALID_FIELD, or as `send`.
        """
        cloud, now = self.cloud, self.cloud.now()
        brought = request.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in request.headers
        chunk_bytes = cloud.settings.upload_chunk_bytes

        def about(admission: PartAdmission) -> Announced:
            limit = most_bytes(cloud, self.kind, admission)
            return announced(request, limit, length_header=UPLOAD_LENGTH_HEADER, digest_header=REPR_DIGEST_HEADER)

        def begin(session: Session) -> tuple[PartUpload, str | None]:
            device_id, admission = self._admit(session)
            file = about(admission)
            again = part_uploads.take_again(
                session, device_id, admission.run_id, self.assignment_id, self.kind, file.sha256, now
            )
            if again is not None:
                return part_uploads.complete(again, chunk_bytes), None
            place = (session, self.assignment_id, self.kind, file.sha256)
            return part_uploads.begin(*place, file.size_bytes, chunk_bytes, now)

        def look(session: Session, admission: PartAdmission) -> tuple[Announced, PartUpload | None]:
            file = about(admission)
            place = (session, self.assignment_id, self.kind, file.sha256)
            return file, part_uploads.look(*place, file.size_bytes, chunk_bytes)

        if not brought:
            upload, forgotten = await cloud.write(begin)
            await self._drop(forgotten)
            return upload, not (upload.received_bytes or upload.receipt)
        admission, (file, begun) = await admitted(*self._part, look)
        if begun is not None and (begun.received_bytes or begun.receipt):
            return begun, False
        return await self._begin_with_chunk(request, admission, file, begun), True

    async def send(self, request: Request, upload_id: str, offset: int) -> PartUpload:
        """Take the chunk at `offset`; the last one completes the file.

        Raises:
            DomainError: as `updates.admit_part`, `part_uploads.record_chunk` and `receive_file`.
        """

        def look(session: Session, _admission: PartAdmission) -> tuple[UploadPlace, Announced]:
            place = part_uploads.place(session, self.assignment_id, self.kind, upload_id, offset)
            chunk = announced(request, place.chunk_size)
            place.refuse_other(chunk.sha256)
            return place, chunk

        admission, (place, chunk) = await admitted(*self._part, look)
        if chunk.size_bytes != place.chunk_size:
            detail = (
                f"expected a chunk of {place.chunk_size} bytes at {offset}, `Content-Length` says {chunk.size_bytes}"
            )
            raise DomainError(ErrorCode.INVALID_FIELD, detail, expected=place.chunk_size, received=chunk.size_bytes)
        file = Announced(place.size_bytes, place.sha256)
        gate = HeaderGate(self.kind, admission, file.size_bytes) if offset == 0 else None
        stored = await receive_chunk(request, self.cloud, chunk, gate, upload_id, offset)
        last = offset + stored.size == file.size_bytes
        if last and (receipt := await self._adopt(upload_id, file, admission, stored.size)) is not None:
            return part_uploads.complete(receipt, self.cloud.settings.upload_chunk_bytes)
        upload = await self._record(admission, upload_id, file, stored, offset)
        return await self._completed(upload)

    async def complete(self, upload_id: str) -> tuple[PartReceipt, bool]:
        """Put a file together whose chunks are all recorded. Returns its receipt, and whether it is a new one."""
        # Side by side, each would write the whole file, and ask for nothing but one small request.
        async with self.cloud.completing.of(upload_id):
            return await self._complete(upload_id)

    def ask(self, session: Session, upload_id: str) -> PartUpload:
        """Return how far an upload has come."""
        device_id = recognise_device(session, self.cloud, self.presented)
        assignments.owned(session, device_id, self.assignment_id)
        return part_uploads.get(session, self.assignment_id, self.kind, upload_id)

    @property
    def _part(self) -> tuple[Cloud, Presented, str, PartKind]:
        return self.cloud, self.presented, self.assignment_id, self.kind

    def _admit(self, session: Session) -> tuple[str, PartAdmission]:
        device_id = authenticate_device(session, self.cloud, self.presented)
        return device_id, updates.admit_part(session, device_id, self.assignment_id, self.kind, self.cloud.now())

    async def _begin_with_chunk(
        self, request: Request, admission: PartAdmission, file: Announced, begun: PartUpload | None
    ) -> PartUpload:
        cloud, size_bytes = self.cloud, file.size_bytes
        chunk = announced(request, min(LARGEST_CHUNK, size_bytes))
        least, most = (
            (begun.chunk_bytes,) * 2 if begun is not None else (cloud.settings.upload_chunk_bytes, LARGEST_CHUNK)
        )
        if not min(least, size_bytes) <= chunk.size_bytes <= min(most, size_bytes):
            detail = f"expected a first chunk of {least} to {most} bytes, or the file if it has less"
            detail += f", `Content-Length` says {chunk.size_bytes}"
            raise DomainError(ErrorCode.INVALID_FIELD, detail, expected=[least, most], received=chunk.size_bytes)
        upload_id = (begun and begun.upload_id) or part_uploads.new_upload_id(cloud.now())
        gate = HeaderGate(self.kind, admission, size_bytes)
        stored = await receive_chunk(request, cloud, chunk, gate, upload_id, 0)
        if stored.size == size_bytes and (receipt := await self._adopt(upload_id, file, admission, stored.size)):
            return part_uploads.complete(receipt, cloud.settings.upload_chunk_bytes)
        now = cloud.now()

        def record(session: Session) -> tuple[PartUpload, str | None]:
            device_id, _ = self._admit(session)  # Again: it locks the round, so that one upload is begun.
            place = (session, self.assignment_id, self.kind)
            first = FirstChunk(upload_id, stored.sha256)
            begun = part_uploads.begin(*place, file.sha256, size_bytes, stored.size, now, first=first)
            traffic.add(session, admission.run_id, device_id, "up", self.kind.value, stored.size)
            return begun

        upload, unwanted = None, upload_id if begun is None else None
        try:
            upload, forgotten = await cloud.write(record, durable=False)
            await self._drop(forgotten)
        finally:
            if upload is None or upload.upload_id != upload_id:
                await self._drop(unwanted)
        return await self._completed(upload)

    async def _record(
        self, admission: PartAdmission, upload_id: str, file: Announced, chunk: StoredBlob, offset: int
    ) -> PartUpload:
        now = self.cloud.now()

        def record(session: Session) -> PartUpload:
            # It may have been revoked while the bytes came.
            device_id = authenticate_device(session, self.cloud, self.presented)
            traffic.add(session, admission.run_id, device_id, "up", self.kind.value, chunk.size)
            if offset + chunk.size == file.size_bytes:  # Another request may have completed the file meanwhile.
                receipt = updates.find_receipt(session, self.assignment_id, self.kind, file.sha256)
                if receipt is not None:
                    return part_uploads.complete(receipt, self.cloud.settings.upload_chunk_bytes)
            place = (session, self.assignment_id, self.kind, upload_id)
            return part_uploads.record_chunk(*place, offset, chunk.sha256, now)

        return await self.cloud.write(record, durable=False)

    async def _completed(self, upload: PartUpload) -> PartUpload:
        """Complete an upload of which all is recorded; return another as it is."""
        if upload.upload_id is None or upload.received_bytes < upload.size_bytes:
            return upload
        receipt, _ = await self.complete(upload.upload_id)
        return part_uploads.complete(receipt, upload.chunk_bytes)

    async def _adopt(
        self, upload_id: str, file: Announced, admission: PartAdmission, last_chunk_bytes: int
    ) -> PartReceipt | None:
        """Complete a file that this process took whole, with its last chunk; None: it must be put together."""
        gate = HeaderGate(self.kind, admission, file.size_bytes)
        try:
            blob = await in_thread(adopt, self.cloud, upload_id, file, gate)
        except DomainError as error:
            if error.code in _WRONG_FILE:
                await self._forget(upload_id)
            raise
        if blob is None:
            return None
        return await self._receipt(upload_id, blob, self.cloud.now(), (admission.run_id, last_chunk_bytes))

    async def _complete(self, upload_id: str) -> tuple[PartReceipt, bool]:
        def find(session: Session) -> tuple[PartAdmission, ReceivedFile | PartReceipt]:
            _, admission = self._admit(session)
            place = (session, self.assignment_id, self.kind)
            known = updates.find_receipt(*place, part_uploads.announced_file(*place, upload_id))
            return admission, known or part_uploads.received_file(*place, upload_id)

        admission, file = await self.cloud.write(find)
        if isinstance(file, PartReceipt):
            return file, False
        gate = HeaderGate(self.kind, admission, file.size_bytes)
        try:
            blob = await in_thread(assemble, self.cloud, upload_id, file, gate)
        except DomainError as error:
            if error.code in _WRONG_FILE:
                await self._forget(upload_id)
            elif error.code is ErrorCode.ARTIFACT_NOT_FOUND:
                await self._forget(upload_id)
                raise DomainError(ErrorCode.UPLOAD_NOT_FOUND, "chunks of it are gone; begin again") from error
            raise
        now = self.cloud.now()
        receipt = await self._receipt(upload_id, blob, now)
        return receipt, receipt.received_at == now

    async def _receipt(
        self, upload_id: str, blob: StoredBlob, now: datetime, sent: tuple[str, int] | None = None
    ) -> PartReceipt:
        """Record that the store has the file, and forget the upload. `sent`: the run, and bytes not counted before."""

        def record(session: Session) -> PartReceipt:
            device_id = authenticate_device(session, self.cloud, self.presented)
            receipt = updates.record_part(
                session, device_id, self.assignment_id, self.kind, blob.sha256, blob.size, now
            )
            if sent is not None:
                traffic.add(session, sent[0], device_id, "up", self.kind.value, sent[1])
            part_uploads.forget(session, upload_id)
            return receipt

        receipt = await self.cloud.write(record)
        await self._drop(upload_id)
        return receipt

    async def _forget(self, upload_id: str) -> None:
        await self.cloud.write(lambda session: part_uploads.forget(session, upload_id))
        await self._drop(upload_id)

    async def _drop(self, upload_id: str | None) -> None:
        if upload_id is not None:
            await in_thread(self.cloud.blobs.drop_stage, upload_id)
