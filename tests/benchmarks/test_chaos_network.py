"""The proxy that spoils connections, in front of a server of a few lines."""

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.chaos.network import Request, SpoilingProxy, Tamper, verdict

PATH = "/v1/assignments/a/submission"
RECEIPT = b'{"assignment_id": "a", "update_sha256": "1f"}'


class Server(ThreadingHTTPServer):
    """Remembers what came whole."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.status = 201
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers with a receipt."""

    server: Server

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) == length:
            self.server.bodies.append(body)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(RECEIPT)))
        self.end_headers()
        self.wfile.write(RECEIPT)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def post(proxy: SpoilingProxy, body: bytes) -> bytes | None:
    """Return the answer's body; None if the connection broke."""
    connection = http.client.HTTPConnection(proxy.address.removeprefix("http://"), timeout=10)
    try:
        connection.request("POST", PATH, body=body)
        return connection.getresponse().read()
    except (http.client.HTTPException, ConnectionError):
        return None
    finally:
        connection.close()


def spoiling(server: Server, *tampers: Tamper | None) -> SpoilingProxy:
    """A proxy that does this to the first requests, and nothing to later ones."""
    coming = list(tampers)

    def decide(request: Request) -> Tamper | None:
        assert request.kind == "submission"
        return coming.pop(0) if coming else None

    return SpoilingProxy(server.server_address[1], decide, seed=3)


def eventually(server: Server, count: int) -> list[bytes]:
    deadline = time.monotonic() + 10
    while len(server.bodies) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return server.bodies


def test_an_untouched_request_passes_and_its_receipt_is_kept(server: Server) -> None:
    with spoiling(server) as proxy:
        assert post(proxy, b"one") == RECEIPT
        assert (proxy.seen.receipts, proxy.seen.faults) == ({"a": "1f"}, [])
    assert server.bodies == [b"one"]


@pytest.mark.parametrize(
    ("tamper", "arrived", "answered"),
    [
        (Tamper.CUT_SENDING, 0, False),
        (Tamper.CUT_WAITING, 1, False),
        (Tamper.CUT_RECEIVING, 1, False),
        (Tamper.DELAY, 1, True),
        (Tamper.DUPLICATE, 2, True),
        (Tamper.REPLAY, 3, True),
    ],
)
def test_what_is_done_to_a_request(server: Server, tamper: Tamper, arrived: int, answered: bool) -> None:
    with spoiling(server, tamper) as proxy:
        assert (post(proxy, b"one" * 1000) == RECEIPT) == answered
        assert eventually(server, arrived) == [b"one" * 1000] * arrived


def test_a_later_request_overtakes_one_that_is_held(server: Server) -> None:
    with spoiling(server, Tamper.REORDER) as proxy:
        first = threading.Thread(target=post, args=(proxy, b"first"))
        first.start()
        time.sleep(0.3)
        post(proxy, b"second")
        first.join()
    assert server.bodies == [b"second", b"first"]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("PUT /v1/assignments/a/parts/logits", "part"),
        ("POST /v1/assignments/a/parts/logits/uploads", "upload begun"),
        ("PATCH /v1/assignments/a/parts/logits/uploads/u", "chunk"),
        ("POST /v1/assignments/a/parts/logits/uploads/u/completion", "other"),
        ("POST /v1/assignments/a/submission", "submission"),
        ("POST /v1/assignments/a/refusal", "other"),
    ],
)
def test_requests_have_their_kinds(line: str, kind: str) -> None:
    assert Request(f"{line} HTTP/1.1\r\n\r\n".encode(), b"").kind == kind


def test_what_a_device_sent_is_kept_and_can_be_sent_again(server: Server) -> None:
    with spoiling(server) as proxy:
        post(proxy, b"one")
        post(proxy, b"two")
        assert proxy.send_again(proxy.seen.requests.copy()) == {"201": 2}
    assert server.bodies == [b"one", b"two"] * 2


def test_an_answer_is_told_by_its_problem_or_its_status() -> None:
    assert verdict(b'HTTP/1.1 401 Unauthorized\r\n\r\n{"code": "request_replayed"}') == "request_replayed"
    assert verdict(b"HTTP/1.1 409 Conflict\r\n\r\nnot JSON") == "409"
    assert verdict(b"HTTP/1.1 204 No Content\r\n\r\n") == "204"


def test_an_answer_of_500_is_a_fault_and_of_503_is_not(server: Server) -> None:
    with spoiling(server) as proxy:
        for server.status in (503, 500):
            post(proxy, b"one")
        assert [PATH in fault and "500" in fault for fault in proxy.seen.faults] == [True]
