"""An S3-compatible object store as a blob store.

A file is first written and hashed in a folder of this machine, and sent when it is whole and right. An object appears
in one step, by a single PUT or by the completion of a multipart upload, so that nobody ever sees a part of one. Reading
streams; what needs a file of this machine gets a copy, whose hash is checked, and which is removed after use.
"""

import base64
import hashlib
import io
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from persistence.blobs.address import S3Address
from persistence.blobs.interface import (
    COPY_BYTES,
    BlobStore,
    BlobWriter,
    StagedChunk,
    StoredBlob,
    StoredObject,
    check_sha256,
    check_stage,
    missing,
    unavailable,
)
from persistence.errors import StorageError
from protocol.errors import DomainError, ErrorCode

PART_BYTES = 8 * 2**20
"""Of a multipart upload: what is in memory at a time. A larger file is sent in parts."""

MOST_PARTS = 10_000
"""S3 takes no more parts of one object."""

_SCRATCH_KEPT = timedelta(days=1)

_NOT_THERE = frozenset({"404", "NoSuchKey", "NotFound", "NoSuchUpload"})

# Their debug lines hold signed requests.
for _name in ("boto3", "botocore", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class S3BlobStore(BlobStore):
    """Objects of a bucket under a prefix.

    Args:
        scratch: a folder of this machine.

    Raises:
        StorageError: the bucket does not answer, or refuses.
    """

    def __init__(self, address: S3Address, scratch: Path) -> None:
        super().__init__(scratch / "incoming")
        # Of a process of this machine that was killed; another machine's sweep does not see this folder.
        super().remove_unfinished(datetime.now(UTC) - _SCRATCH_KEPT)
        self._bucket = address.bucket
        self._prefix = address.prefix
        self._where = f"s3://{address.bucket}/{address.prefix}"
        session = boto3.session.Session()
        config = Config(
            signature_version="s3v4",
            connect_timeout=5,
            read_timeout=30,
            retries={"mode": "standard", "max_attempts": 4},
            max_pool_connections=50,
            # Of Amazon's own checksums most other stores know nothing.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if address.endpoint_url else "auto"},
        )
        try:
            self._client: Any = session.client(
                "s3",
                endpoint_url=address.endpoint_url,
                region_name=session.region_name or "us-east-1",
                config=config,
            )
            self._client.head_bucket(Bucket=self._bucket)
        except (BotoCoreError, ClientError) as error:
            raise StorageError(f"the bucket of {self._where} must be there and be ours to use: {error}") from None

    def stat(self, sha256: str) -> StoredObject | None:
        """As in `BlobStore`."""
        key = self._key(sha256)
        try:
            with self._talking(sha256):
                found = self._client.head_object(Bucket=self._bucket, Key=key)
        except DomainError as error:
            if error.code is ErrorCode.ARTIFACT_NOT_FOUND:
                return None
            raise
        return StoredObject(sha256, found["ContentLength"], found["LastModified"])

    def open(self, sha256: str, start: int = 0) -> BinaryIO:
        """As in `BlobStore`."""
        return self._open(self._key(sha256), sha256, start)

    @contextmanager
    def local(self, sha256: str) -> Iterator[Path]:
        """A copy of the object, as long as the context lasts."""
        path = self.incoming / f"copy-{secrets.token_hex(16)}"
        digest = hashlib.sha256()
        try:
            with self.open(sha256) as source, path.open("xb") as target:
                while chunk := source.read(COPY_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
            if digest.hexdigest() != sha256:
                detail = f"{self._where} gave other bytes for {sha256}: their SHA-256 is {digest.hexdigest()}"
                raise DomainError(ErrorCode.DIGEST_MISMATCH, detail, expected=sha256, received=digest.hexdigest())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def link(self, sha256: str, seconds: int) -> str | None:
        """As in `BlobStore`. It is signed here; the store is not asked."""
        arguments = {"Bucket": self._bucket, "Key": self._key(sha256)}
        with self._talking(sha256):
            return str(self._client.generate_presigned_url("get_object", Params=arguments, ExpiresIn=seconds))

    def remove(self, sha256: str) -> None:
        """As in `BlobStore`."""
        key = self._key(sha256)
        with self._talking(sha256):
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def objects(self) -> Iterator[StoredObject]:
        """As in `BlobStore`."""
        for each in self._list("objects/"):
            yield StoredObject(each["Key"].rpartition("/")[2], each["Size"], each["LastModified"])

    def chunk_writer(self, stage: str, offset: int, size_bytes: int) -> BlobWriter:
        """As in `BlobStore`. A chunk is an object of its own: whichever machine takes the next one, it is there."""
        check_stage(stage)
        try:
            return BlobWriter(
                self._new_path(), size_bytes, lambda file, _, sha256: self._send(file, self._key(sha256, stage), sha256)
            )
        except OSError as error:
            raise unavailable(error) from error

    def open_staged(self, stage: str, chunk: StagedChunk) -> BinaryIO:
        """As in `BlobStore`."""
        return self._open(self._key(chunk.sha256, stage), chunk.sha256)

    def adopt_stage(
        self, stage: str, sha256: str, size_bytes: int, admit: Callable[[io.RawIOBase], None]
    ) -> StoredBlob | None:
        """As in `BlobStore`: None. Objects are put together by writing them again."""
        return None

    def drop_stage(self, stage: str) -> None:
        """As in `BlobStore`."""
        check_stage(stage)
        for each in list(self._list(f"staged/{stage}/")):
            with self._talking(stage):
                self._client.delete_object(Bucket=self._bucket, Key=each["Key"])

    def stages(self) -> Iterator[tuple[str, datetime]]:
        """As in `BlobStore`."""
        newest: dict[str, datetime] = {}
        for each in self._list("staged/"):
            stage = each["Key"].rsplit("/", 2)[1]
            newest[stage] = max(newest.get(stage, each["LastModified"]), each["LastModified"])
        yield from newest.items()

    def remove_unfinished(self, before: datetime) -> int:
        """As in `BlobStore`, and end multipart uploads that were begun before that and never completed."""
        removed = super().remove_unfinished(before)
        with self._talking("multipart uploads"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            begun = [each for page in pages for each in page.get("Uploads", ())]
        for each in begun:
            if each["Initiated"] < before:
                self._abort(each["Key"], each["UploadId"])
                removed += 1
        return removed

    def check(self) -> None:
        """As in `BlobStore`."""
        with self._talking(self._where):
            self._client.head_bucket(Bucket=self._bucket)

    def _adopt(self, file: io.FileIO, path: Path, sha256: str) -> None:
        if self.stat(sha256) is None:
            self._send(file, self._key(sha256), sha256)

    def _send(self, file: io.FileIO, key: str, sha256: str) -> None:
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        if size > PART_BYTES:
            self._send_in_parts(file, size, key, sha256)
            return
        content = file.read()
        assert content is not None
        with self._talking(sha256):
            self._client.put_object(Bucket=self._bucket, Key=key, Body=content, ContentMD5=_md5(content))

    def _send_in_parts(self, file: io.FileIO, size: int, key: str, sha256: str) -> None:
        part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
        place = {"Bucket": self._bucket, "Key": key}
        with self._talking(sha256):
            upload_id = self._client.create_multipart_upload(**place)["UploadId"]
        try:
            with self._talking(sha256):
                parts: list[dict[str, Any]] = []
                while content := file.read(part_bytes):
                    number = len(parts) + 1
                    answer = self._client.upload_part(
                        **place, UploadId=upload_id, PartNumber=number, Body=content, ContentMD5=_md5(content)
                    )
                    parts.append({"PartNumber": number, "ETag": answer["ETag"]})
                self._client.complete_multipart_upload(**place, UploadId=upload_id, MultipartUpload={"Parts": parts})
        except BaseException:
            self._abort(key, upload_id)
            raise

    def _abort(self, key: str, upload_id: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload_id)
        except (BotoCoreError, ClientError):  # the sweep finds it, or it is over already
            return

    def _open(self, key: str, sha256: str, start: int = 0) -> BinaryIO:
        arguments = {"Range": f"bytes={start}-"} if start else {}
        with self._talking(sha256):
            body = self._client.get_object(Bucket=self._bucket, Key=key, **arguments)["Body"]
        return cast("BinaryIO", io.BufferedReader(_ObjectBytes(body), COPY_BYTES))

    def _list(self, under: str) -> Iterator[dict[str, Any]]:
        pages = iter(
            self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix + under)
        )
        while True:
            with self._talking(under):
                page = next(pages, None)
            if page is None:
                return
            yield from page.get("Contents", ())

    def _key(self, sha256: str, stage: str | None = None) -> str:
        check_sha256(sha256)
        if stage is None:
            return f"{self._prefix}objects/{sha256[:2]}/{sha256}"
        check_stage(stage)
        return f"{self._prefix}staged/{stage}/{sha256}"

    @contextmanager
    def _talking(self, subject: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in _NOT_THERE:
                raise missing(subject) from None
            raise DomainError(ErrorCode.UNAVAILABLE, f"{self._where} refuses: {error}") from error
        except BotoCoreError as error:
            raise DomainError(ErrorCode.UNAVAILABLE, f"{self._where} does not answer: {error}") from error


class _ObjectBytes(io.RawIOBase):
    """An object's bytes as they come, as a file that can be read once, forwards."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self._body = body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._body.read(len(buffer))
        except (BotoCoreError, HTTPError) as error:
            raise OSError(f"the object store broke off: {type(error).__name__}") from error
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._body.close()
        super().close()


def _md5(content: bytes) -> str:
    """As `Content-MD5` wants it: the checksum of a body that every store knows. It protects from accidents only."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
