"""Speaks to the cloud: one method a call, errors mapped once, every body that leaves entered in the ledger.

Retries are not here: a method makes one attempt and says how it ended (`CloudUnavailable`: again later; `CloudRefused`:
no). Redirects are not followed, as a credential must not travel to another host. Where the owner allows links, a file
may be fetched from where the server points to: by a connection that knows no credential, and its bytes are checked by
their hash as always.
"""

import hashlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel

import tracing
from edge_agent.answers import Schema, parse_answer, parse_assignment
from edge_agent.errors import CloudRefused, CloudUnavailable, NotAuthorised, Stopped
from edge_agent.interruption import call_until_stopped
from edge_agent.ledger import Ledger, Purpose
from edge_agent.links import LinkFollower
from edge_agent.signing import DeviceAuthentication
from protocol import PROTOCOL_VERSION
from protocol.assignments import (
    Assignment,
    AssignmentName,
    AssignmentProgress,
    AssignmentRefusal,
    Part,
    PartReceipt,
    PartUpload,
    Submission,
    SubmissionReceipt,
)
from protocol.devices import (
    Device,
    DeviceCredential,
    EnrolmentReceipt,
    EnrolmentRequest,
    Heartbeat,
    HeartbeatReceipt,
)
from protocol.errors import ErrorCode
from protocol.headers import (
    CONTENT_DIGEST_HEADER,
    IDEMPOTENCY_KEY_HEADER,
    LINKS_FOLLOW,
    LINKS_HEADER,
    PROTOCOL_HEADER,
    REPR_DIGEST_HEADER,
    UPLOAD_LENGTH_HEADER,
    UPLOAD_OFFSET_HEADER,
    content_digest,
)

CHUNK_BYTES = 256 * 1024
LONGEST_RETRY_AFTER_SECONDS = 3600.0
"""A wrong `Retry-After` must not put a device to sleep for days."""

LARGEST_ANSWER_BYTES = 8 * 2**20
"""Of JSON; files are downloaded to disk, and their sizes are known before."""

LATER = frozenset(
    {
        ErrorCode.DEVICE_NOT_APPROVED,
        ErrorCode.DIGEST_MISMATCH,
        ErrorCode.TRUNCATED_BODY,
        ErrorCode.SIGNATURE_EXPIRED,
        ErrorCode.REQUEST_REPLAYED,
        ErrorCode.UPLOAD_NOT_FOUND,
        ErrorCode.UPLOAD_OFFSET_MISMATCH,
    }
)
"""Problems that go away by themselves: an operator approves; bytes that the network spoilt are sent again; each attempt
is signed anew, by the server's clock; an upload that was forgotten is begun anew."""

OF_THE_TRANSFER = frozenset({"content-encoding", "content-length", "transfer-encoding"})
"""Headers that no longer hold once a body has been read."""

TIMEOUT = httpx.Timeout(connect=5.0, read=30.0, write=30.0, pool=5.0)
LONG_POLL_MARGIN_SECONDS = 15.0


class CloudClient:
    """One device's connection to the cloud. Thread-safe. Every call ends soon after `stop` is set."""

    def __init__(
        self,
        server_url: str,
        credential: str | None,
        ledger: Ledger,
        stop: threading.Event,
        *,
        now: Callable[[], datetime],
        signing_key: Ed25519PrivateKey | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: httpx.Timeout = TIMEOUT,
        follow_links: bool = False,
    ) -> None:
        headers = {PROTOCOL_HEADER: PROTOCOL_VERSION, "User-Agent": "cotune-agent"}
        self._authentication = None if credential is None else DeviceAuthentication(credential, signing_key, now)
        # A proxy of the environment is for the outside; a server on this machine is reached directly.
        local = urlsplit(server_url).hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            base_url=server_url,
            headers=headers,
            auth=self._authentication,
            timeout=timeout,
            trust_env=not local,
            verify=True if tls is None else tls,
        )
        self._server_url = server_url
        self._ledger = ledger
        self._stop = stop
        self._now = now
        self._timeout = timeout
        self._links = LinkFollower(server_url, timeout, trust_env=not local) if follow_links else None

    def __enter__(self) -> "CloudClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()
        if self._links is not None:
            self._links.close()

    def enrol(self, request: EnrolmentRequest, idempotency_key: str) -> EnrolmentReceipt:
        """Trade a one-time token for an identity. The same again, with the same key, gets the same identity."""
        body, headers = request.model_dump_json().encode(), {IDEMPOTENCY_KEY_HEADER: idempotency_key}
        response = self._send("POST", "/v1/devices", body=body, purpose=Purpose("enrolment"), headers=headers)
        return parse_answer(response, EnrolmentReceipt)

    def whoami(self) -> Device:
        """Return this device as the server sees it."""
        return parse_answer(self._send("GET", "/v1/devices/me"), Device)

    def replace_credential(self) -> DeviceCredential:
        """Ask for a new credential. It is stored before it is used: see `edge_agent.rotation`."""
        return parse_answer(self._send("POST", "/v1/devices/me/credential"), DeviceCredential)

    def use_credential(self, credential: str) -> None:
        """Send another credential from now on."""
        assert self._authentication is not None, "only who has a credential can replace it"
        self._authentication.credential = credential

    def heartbeat(self, heartbeat: Heartbeat) -> HeartbeatReceipt:
        """Say that the device is alive."""
        return self._post("/v1/devices/me/heartbeat", heartbeat, Purpose("heartbeat"), HeartbeatReceipt)

    def next_assignment(self, wait_seconds: int) -> Assignment | None:
        """Ask for work; the server answers when there is some, or with None after `wait_seconds`.

        Raises:
            UnknownStrategy: there is work that this device is too old for; refuse it.
        """
        parts = self._timeout.as_dict() | {"read": wait_seconds + LONG_POLL_MARGIN_SECONDS}
        timeout = httpx.Timeout(**parts)
        path = f"/v1/devices/me/assignment?wait_seconds={wait_seconds}"
        response = self._send("GET", path, timeout=timeout)
        return None if response.status_code == httpx.codes.NO_CONTENT else parse_assignment(response)

    def last_step(self, assignment_id: str) -> Assignment | None:
        """Ask for the step after the last round; None: the run goes on."""
        response = self._send("GET", f"/v1/assignments/{assignment_id}/last-step")
        return None if response.status_code == httpx.codes.NO_CONTENT else parse_assignment(response)

    def report_progress(self, assignment: Assignment, progress: AssignmentProgress) -> None:
        """Say where the device is with an assignment."""
        body = progress.model_dump_json().encode()
        path = f"/v1/assignments/{assignment.assignment_id}/progress"
        self._send("POST", path, body=body, purpose=purpose_of(assignment, "progress"))

    def refuse(self, assignment: AssignmentName, refusal: AssignmentRefusal) -> None:
        """Say that this device cannot do an assignment."""
        body = refusal.model_dump_json().encode()
        path = f"/v1/assignments/{assignment.assignment_id}/refusal"
        self._send("POST", path, body=body, purpose=purpose_of(assignment, "refusal"))

    def upload_part(self, assignment: Assignment, part: Part, file: Path) -> PartReceipt:
        """Send one file of an update. Sending it again is harmless."""
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(part.size_bytes),
            CONTENT_DIGEST_HEADER: content_digest(part.sha256),
        }
        self._ledger.record(purpose_of(assignment, part.kind.value), part.size_bytes, part.sha256, durable=True)
        request = self._http.build_request(
            "PUT",
            _part_path(assignment, part),
            headers=headers,
            content=self._chunks(file),
        )
        return parse_answer(self._exchange(request), PartReceipt)

    def begin_upload(self, assignment: Assignment, part: Part, first_chunk: bytes = b"") -> PartUpload:
        """Say which file will come in chunks, perhaps with the first, and learn how much is there. Again: harmless."""
        headers = {UPLOAD_LENGTH_HEADER: str(part.size_bytes), REPR_DIGEST_HEADER: content_digest(part.sha256)}
        path = f"{_part_path(assignment, part)}/uploads"
        if not first_chunk:
            return parse_answer(self._exchange(self._http.build_request("POST", path, headers=headers)), PartUpload)
        return self._send_chunk("POST", path, assignment, part, headers, first_chunk)

    def send_chunk(self, assignment: Assignment, part: Part, upload_id: str, offset: int, chunk: bytes) -> PartUpload:
        """Send the bytes of a file from `offset` on. Sending them again is harmless."""
        path = f"{_part_path(assignment, part)}/uploads/{upload_id}"
        return self._send_chunk("PATCH", path, assignment, part, {UPLOAD_OFFSET_HEADER: str(offset)}, chunk)

    def _send_chunk(  # noqa: PLR0917
        self, method: str, path: str, assignment: Assignment, part: Part, headers: dict[str, str], chunk: bytes
    ) -> PartUpload:
        sha256 = hashlib.sha256(chunk).hexdigest()
        headers |= {"Content-Type": "application/octet-stream", CONTENT_DIGEST_HEADER: content_digest(sha256)}
        self._ledger.record(purpose_of(assignment, part.kind.value), len(chunk), sha256, durable=True)
        return parse_answer(
            self._exchange(self._http.build_request(method, path, headers=headers, content=chunk)), PartUpload
        )

    def complete_upload(self, assignment: Assignment, part: Part, upload_id: str) -> PartReceipt:
        """Say that all chunks were sent, where no receipt came. Saying it again is harmless."""
        path = f"{_part_path(assignment, part)}/uploads/{upload_id}/completion"
        return parse_answer(self._send("POST", path), PartReceipt)

    def submit(self, assignment: Assignment, submission: Submission) -> SubmissionReceipt:
        """Hand the update in. Handing in the same one again answers with the same receipt."""
        path = f"/v1/assignments/{assignment.assignment_id}/submission"
        return self._post(path, submission, purpose_of(assignment, "submission"), SubmissionReceipt, durable=True)

    def download(self, sha256: str, offset: int, write: Callable[[bytes, int], None]) -> None:
        """Fetch an artifact from byte `offset` on; `write(chunk, position)` is given the pieces in order.

        The position starts at `offset`, or at 0 if the server sends the whole file all the same.

        Raises:
            CloudUnavailable: it broke off; `progressed` says whether something came.
        """
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers |= {"Range": f"bytes={offset}-", "If-Range": f'"{sha256}"'}
        if self._links is not None:
            headers[LINKS_HEADER] = LINKS_FOLLOW
        request = self._http.build_request("GET", f"/v1/artifacts/{sha256}", headers=headers)
        call_until_stopped(lambda: self._download(request, offset, write), self._stop)

    def _download(self, request: httpx.Request, offset: int, write: Callable[[bytes, int], None]) -> None:
        progressed = False
        try:
            response = self._open(request, offset)
            try:
                if not response.is_success:
                    raise self._error(self._read(response))
                position = offset if response.status_code == httpx.codes.PARTIAL_CONTENT else 0
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    if self._stop.is_set():
                        raise Stopped
                    write(chunk, position)
                    position += len(chunk)
                    progressed = True
            finally:
                response.close()
        except httpx.TransportError as error:
            raise self._unreachable(error, progressed=progressed) from None

    def _open(self, request: httpx.Request, offset: int) -> httpx.Response:
        """Send a request for a file; go where the answer points to, if it points somewhere and the owner allows it."""
        response = self._http.send(request, stream=True)
        if self._links is None or response.status_code != httpx.codes.TEMPORARY_REDIRECT:
            return response
        response.close()
        try:
            return self._links.open(response.headers.get("Location", ""), offset)
        except CloudUnavailable:
            # Whatever is wrong with that place, the server has the file too.
            self._links.close()
            self._links = None
            raise

    def _chunks(self, file: Path) -> Iterator[bytes]:
        with open(file, "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                if self._stop.is_set():
                    raise Stopped
                yield chunk

    def _post(
        self, path: str, body: BaseModel, purpose: Purpose, answer: type[Schema], *, durable: bool = False
    ) -> Schema:
        encoded = body.model_dump_json().encode()
        return parse_answer(self._send("POST", path, body=encoded, purpose=purpose, durable=durable), answer)

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        purpose: Purpose | None = None,
        durable: bool = False,
        timeout: httpx.Timeout | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        headers = dict(headers or {})
        if body is not None and purpose is not None:
            sha256 = hashlib.sha256(body).hexdigest()
            headers |= {"Content-Type": "application/json", CONTENT_DIGEST_HEADER: content_digest(sha256)}
            self._ledger.record(purpose, len(body), sha256, durable=durable)
        request = self._http.build_request(
            method, path, content=body, headers=headers, timeout=timeout or self._timeout
        )
        return self._exchange(request)

    def _exchange(self, request: httpx.Request) -> httpx.Response:
        request.headers.update(tracing.outgoing_headers())
        try:
            response = call_until_stopped(lambda: self._bounded(request), self._stop)
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        if not response.is_success:
            raise self._error(response)
        return response

    def _bounded(self, request: httpx.Request) -> httpx.Response:
        """Send, and read an answer of at most `LARGEST_ANSWER_BYTES`, unpacked."""
        response = self._http.send(request, stream=True)
        try:
            return self._read(response)
        finally:
            response.close()

    def _read(self, response: httpx.Response) -> httpx.Response:
        body = bytearray()
        for chunk in response.iter_bytes(CHUNK_BYTES):
            body += chunk
            if len(body) > LARGEST_ANSWER_BYTES:
                raise CloudUnavailable(f"{self._server_url} answered with more than {LARGEST_ANSWER_BYTES} bytes")
        headers = {name: value for name, value in response.headers.items() if name not in OF_THE_TRANSFER}
        return httpx.Response(response.status_code, headers=headers, content=bytes(body), request=response.request)

    def _unreachable(self, error: httpx.TransportError, *, progressed: bool = False) -> CloudUnavailable:
        text = str(error) or type(error).__name__
        return CloudUnavailable(f"{self._server_url} does not answer: {text}", progressed=progressed)

    def _error(self, response: httpx.Response) -> CloudRefused | CloudUnavailable:
        """Map an answer that is not a success. Whatever is not a problem of ours is somebody else's: try again."""
        code, detail = _problem(response)
        status = response.status_code
        if status in (408, 425, 429) or status >= 500 or code is None or code in LATER:
            return CloudUnavailable(
                f"{self._server_url} answered {status}: {detail}",
                retry_after_seconds=retry_after_seconds(response.headers.get("Retry-After"), self._now()),
            )
        kind = NotAuthorised if status in (401, 403) else CloudRefused
        return kind(status, str(code), detail)


def purpose_of(assignment: AssignmentName, kind: str) -> Purpose:
    """Return the ledger's purpose of something sent for an assignment."""
    return Purpose(kind, assignment.run_id, assignment.round_number, assignment.assignment_id)


def _part_path(assignment: Assignment, part: Part) -> str:
    return f"/v1/assignments/{assignment.assignment_id}/parts/{part.kind.value}"


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """Read a `Retry-After` header, seconds or an HTTP date; None if absent or unreadable; at most an hour."""
    if value is None:
        return None
    try:
        seconds = float(value) if value.strip().isdigit() else _seconds_until(parsedate_to_datetime(value), now)
    except ValueError:
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS)


def _seconds_until(moment: datetime, now: datetime) -> float:
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - now).total_seconds()


def _problem(response: httpx.Response) -> tuple[str | None, str]:
    try:
        problem: Any = json.loads(response.content)
    except (ValueError, RecursionError):
        problem = None
    if isinstance(problem, dict) and isinstance(problem.get("code"), str):
        return problem["code"], str(problem.get("detail", ""))[:400]
    return None, f"not an answer of a Cotune server ({response.headers.get('Content-Type', 'no content type')})"
