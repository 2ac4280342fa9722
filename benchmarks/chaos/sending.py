"""Sends spoilt uploads over connections of their own, each signed as the agent does it, or wrongly."""

import http.client
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.chaos.mutations import ADMITTED, MUTATIONS, RIGHT, Judge, Tally, Upload, digest_of, name_of
from benchmarks.chaos.servers import HOST
from edge_agent.signing import DeviceAuthentication
from protocol.signatures import SIGNATURE_HEADER, SIGNATURE_INPUT_HEADER

CONNECTIONS = 3
HOPELESS_BYTES = 2**32
"""A `Content-Length` that is refused before a byte of the body is read."""

NONCE_NOT_TAKEN = frozenset({0, 400, 401})
SIGNED_HEADERS = ("Authorization", SIGNATURE_INPUT_HEADER, SIGNATURE_HEADER)
OLD_SECONDS = 1000.0
"""How old a signature is that is too old."""


@dataclass(frozen=True)
class Place:
    """An assignment that has no part yet, and how its device proves who it is."""

    assignment_id: str
    credential: str
    key: Ed25519PrivateKey


def send_mutated(  # noqa: PLR0917
    port: int, places: Sequence[Place], valid: Mapping[str, bytes], judge: Judge, count: int, seed: int, until: float
) -> Tally:
    """Send `count` mutated uploads over a few connections; stop at `until` (monotonic) whatever is left.

    A part that was admitted ends its assignment's use for parts of this kind, as the service then refuses every other
    one unread. When only one is left, what the judge admits is not sent any more, so that the gate judges all others.

    Args:
        places: at least one a connection.
        valid: by kind of part, a file that the round admits.
    """
    tally, lock = Tally(), threading.Lock()

    def work(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        senders = {kind: [Sender(port, each) for each in places[number::CONNECTIONS]] for kind in sorted(valid)}
        for _ in range(number, count, CONNECTIONS):
            if time.monotonic() > until:
                break
            name, upload, admissible = _mutated(chance, valid, judge, senders)
            status, code = senders[upload.kind][0].send(upload)
            if status in ADMITTED and len(senders[upload.kind]) > 1:
                senders[upload.kind].pop(0).close()
            with lock:
                tally.add(name, upload, status, code, admissible=admissible)
        for sender in itertools.chain(*senders.values()):
            sender.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def _mutated(
    chance: random.Random, valid: Mapping[str, bytes], judge: Judge, senders: Mapping[str, Sequence["Sender"]]
) -> tuple[str, Upload, bool]:
    """Return the mutation's name, the upload, and whether the judge admits it, for which there must be a place left."""
    while True:
        kind = chance.choice(sorted(valid))
        [mutation] = chance.choices(list(MUTATIONS), list(MUTATIONS.values()))
        upload = mutation(chance, valid[kind], kind)
        admissible = judge.admissible(upload)
        if not admissible or len(senders[upload.kind]) > 1:
            return name_of(mutation), upload, admissible


class Signer:
    """Signs requests as the agent does, or wrongly."""

    def __init__(self, credential: str, key: Ed25519PrivateKey) -> None:
        self._right = DeviceAuthentication(credential, key, lambda: datetime.now(UTC))
        self._other_key = DeviceAuthentication(credential, Ed25519PrivateKey.generate(), lambda: datetime.now(UTC))
        self._old = DeviceAuthentication(credential, key, lambda: datetime.now(UTC) - timedelta(seconds=OLD_SECONDS))
        self._spent: dict[str, str] = {}

    def headers(self, path: str, upload: Upload) -> dict[str, str]:
        """Return the headers that prove, or do not, who sends an upload."""
        if upload.signing == "once more" and self._spent:
            return self._spent
        wrongly = {
            "another key": lambda: _signed(self._other_key, path, upload.digest),
            "another path": lambda: _signed(self._right, path + "x", upload.digest),
            "another body": lambda: _signed(self._right, path, digest_of(b"another")),
            "an old one": lambda: _signed(self._old, path, upload.digest),
        }
        if upload.signing in wrongly:
            return wrongly[upload.signing]()
        headers = _signed(self._right, path, upload.digest)
        if upload.signing == "a character changed":
            text = headers[SIGNATURE_HEADER]
            return headers | {SIGNATURE_HEADER: text[:20] + ("A" if text[20] != "A" else "B") + text[21:]}
        return headers if upload.signing == RIGHT else {"Authorization": headers["Authorization"]}

    def answered(self, upload: Upload, headers: Mapping[str, str], status: int) -> None:
        """Note that the service has taken a signature's nonce: what it refused before knows none of it."""
        if upload.signing == RIGHT and status not in NONCE_NOT_TAKEN:
            self._spent = {name: headers[name] for name in SIGNED_HEADERS}


def _signed(authentication: DeviceAuthentication, path: str, digest: str) -> dict[str, str]:
    request = httpx.Request("PUT", f"http://{HOST}{path}", headers={"Content-Digest": digest} if digest else {})
    signed = next(authentication.auth_flow(request)).headers
    return {name: signed[name] for name in SIGNED_HEADERS}


class Sender:
    """One kept-alive connection; a request whose length lies gets one of its own."""

    def __init__(self, port: int, place: Place) -> None:
        self._port = port
        self._signer = Signer(place.credential, place.key)
        self._path = f"/v1/assignments/{place.assignment_id}/parts/"
        self._connection = http.client.HTTPConnection(HOST, port, timeout=30)

    def send(self, upload: Upload) -> tuple[int, str]:
        """Return status and problem code; status 0 where the connection was closed without an answer."""
        if upload.length != len(upload.body):
            return self._send_raw(upload)
        for _ in range(3):
            try:
                headers = self._headers(upload)
                self._connection.request("PUT", self._path + upload.kind, body=upload.body, headers=headers)
                response = self._connection.getresponse()
                self._signer.answered(upload, headers, response.status)
                return response.status, code_of(response.read())
            except (http.client.HTTPException, OSError):
                self._connection.close()  # the API may close after a refusal that came before the body's end
        return 0, "no answer"

    def _headers(self, upload: Upload) -> dict[str, str]:
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(upload.length)}
        if upload.digest:
            headers["Content-Digest"] = upload.digest
        return headers | self._signer.headers(self._path + upload.kind, upload)

    def _send_raw(self, upload: Upload) -> tuple[int, str]:
        lines = [f"PUT {self._path}{upload.kind} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [*(f"{name}: {value}" for name, value in self._headers(upload).items()), "", ""]
        received = b""
        with socket.create_connection((HOST, self._port), timeout=30) as connection:
            try:
                connection.sendall("\r\n".join(lines).encode() + upload.body)
                if upload.length < HOPELESS_BYTES:  # the API would wait for the rest
                    connection.shutdown(socket.SHUT_WR)
                while block := connection.recv(65536):
                    received += block
            except OSError:
                pass
        head, _, body = received.partition(b"\r\n\r\n")
        return (int(head.split(b" ", 2)[1]), code_of(body)) if head else (0, "closed without an answer")

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def code_of(body: bytes) -> str:
    """Return the code of a problem; nothing where the body is none."""
    try:
        return str(json.loads(body).get("code", ""))
    except ValueError:
        return ""
