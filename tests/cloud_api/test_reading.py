"""How much is read off a connection before the application asks for it, with a real server and a small application."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from cloud_api.accepting import LOOP
from cloud_api.reading import ASKED_BYTES, UNASKED_BYTES, reading_little
from cloud_api.server import bind
from cloud_api.transfers import Transfers
from tests.cloud_api.running_api import eventually

LARGE = bytes(range(256)) * 8192
"""2 MiB."""


@dataclass
class Small:
    """An application: `/digest` reads the body, `/later` does so when it may, `/refuse` never, `/large` sends one."""

    may_read: threading.Event = field(default_factory=threading.Event)
    hung_up: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/later":
            while not self.may_read.is_set():
                await asyncio.sleep(0.005)
        answer = b"refused"
        if scope["path"] in {"/digest", "/later"}:
            digest, more = sha256(), True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.hung_up.set()
                    return
                digest.update(message["body"])
                more = message["more_body"]
            answer = digest.hexdigest().encode()
        if scope["path"] == "/wait":
            while (await receive())["type"] != "http.disconnect":
                continue
            self.hung_up.set()
            return
        pieces = [LARGE] * 4 if scope["path"] == "/large" else [answer]
        headers = [(b"content-length", str(sum(map(len, pieces))).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, piece in enumerate(pieces, 1):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces)})


@dataclass
class Served:
    app: Small
    server: uvicorn.Server
    port: int
    tls: ssl.SSLContext | None = None

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls is None:
                yield plain
            else:
                with self.tls.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
                    yield wrapped

    def held(self) -> int:
        """Bytes of bodies that were read and that the application has not taken."""
        found: list[Any] = list(self.server.server_state.connections)
        return sum(len(each.cycle.body) for each in found if each.cycle is not None)


@contextlib.contextmanager
def serving(certificate: Path | None = None, key: Path | None = None) -> Iterator[Served]:
    app = Small()
    config = uvicorn.Config(
        app, loop=LOOP, http=reading_little(Transfers()), ws="none", lifespan="off", log_config=None,
        access_log=False, ssl_certfile=certificate, ssl_keyfile=key, timeout_graceful_shutdown=1,
    )  # fmt: skip
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        eventually(lambda: server.started)
        yield Served(app, server, listener.getsockname()[1])
    finally:
        app.may_read.set()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as each:
        yield each


def request(path: str, body: bytes = b"") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def answer(connection: socket.socket) -> bytes:
    """Read one answer: its body."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1)
    head = received.decode().lower()
    left = int(head.partition("content-length: ")[2].split()[0])
    body = bytearray()
    while len(body) < left:
        body += connection.recv(min(65536, left - len(body)))
    return bytes(body)


def digest(body: bytes) -> bytes:
    return sha256(body).hexdigest().encode()


def exchange_all_sizes(served: Served) -> None:
    """Send bodies around each limit over one connection, and check what the application got."""
    sizes = (0, 1, UNASKED_BYTES - 1, UNASKED_BYTES + 1, ASKED_BYTES - 1, ASKED_BYTES + 1, len(LARGE))
    with served.connection() as connection:
        for size in sizes:
            connection.sendall(request("/digest", LARGE[:size]))
            assert answer(connection) == digest(LARGE[:size])


def test_bodies_of_all_sizes_come_whole_over_one_connection(served: Served) -> None:
    exchange_all_sizes(served)


def test_requests_that_are_sent_together_are_answered_in_order(served: Served) -> None:
    bodies = [LARGE[:size] for size in (10, 0, 100_000, 3, 300_000, 7)]
    with served.connection() as connection:
        sending = threading.Thread(
            target=connection.sendall, args=(b"".join(request("/digest", body) for body in bodies),)
        )
        sending.start()
        assert [answer(connection) for _ in bodies] == [digest(body) for body in bodies]
        sending.join(10)


def test_a_request_may_come_byte_by_byte(served: Served) -> None:
    with served.connection() as connection:
        for number in request("/digest", b"slow but whole"):
            connection.sendall(bytes([number]))
            time.sleep(0.0005)
        assert answer(connection) == digest(b"slow but whole")


def test_little_is_held_of_a_body_until_it_is_asked_for(served: Served) -> None:
    served.app.may_read.clear()
    with contextlib.ExitStack() as open_ones:
        connections = [open_ones.enter_context(served.connection()) for _ in range(5)]
        for connection in connections:  # used before: what was asked for then says nothing of the next request
            connection.sendall(request("/digest", LARGE[:200_000]))
            assert answer(connection) == digest(LARGE[:200_000])
        senders = [threading.Thread(target=each.sendall, args=(request("/later", LARGE),)) for each in connections]
        for sender in senders:
            sender.start()
        eventually(lambda: served.held() > 4 * UNASKED_BYTES)
        time.sleep(0.05)
        assert served.held() <= 5 * UNASKED_BYTES
        served.app.may_read.set()
        for connection, sender in zip(connections, senders, strict=True):
            assert answer(connection) == digest(LARGE)
            sender.join(10)


def test_a_body_that_is_not_read_is_no_hindrance_to_the_next_request(served: Served) -> None:
    with served.connection() as connection:
        sending = threading.Thread(
            target=connection.sendall, args=(request("/refuse", LARGE) + request("/digest", b"next"),)
        )
        sending.start()
        assert answer(connection) == b"refused"
        assert answer(connection) == digest(b"next")
        sending.join(10)


def test_a_slow_reader_gets_everything(served: Served) -> None:
    with served.connection() as connection:
        connection.sendall(request("/large"))
        time.sleep(0.2)  # the server's socket is full long before
        assert answer(connection) == LARGE * 4


@pytest.mark.parametrize(
    "sent",
    [request("/wait"), request("/wait", b"small"), request("/digest", LARGE)[:500_000]],
    ids=["no body", "a small body", "part of a body"],
)
def test_a_client_that_hangs_up_is_noticed(served: Served, sent: bytes) -> None:
    served.app.hung_up.clear()
    with served.connection() as connection:
        connection.sendall(sent)
        assert not served.app.hung_up.wait(0.05)
    assert served.app.hung_up.wait(5)


def test_what_is_no_request_is_refused(served: Served) -> None:
    with served.connection() as connection:
        connection.sendall(b"what is this?\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
