"""A proxy between the devices and the API that spoils connections: cuts, doubles, delays, reorders, replays.

It reads each request whole, asks what shall become of it, and opens a connection of its own to the API for each. What
the API answered is written down, whether or not the device hears of it: a receipt that was lost on the way is a promise
all the same.
"""

import asyncio
import contextlib
import json
import random
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from benchmarks.chaos.servers import HOST

LONGEST_HOLD_SECONDS = 1.0
ANSWER_SECONDS = 60.0
SEND_AGAIN_SECONDS = 30.0
"""Requests that are left then are not sent again."""

_KINDS = (
    ("poll", re.compile(r"GET /v1/devices/me/assignment")),
    ("part", re.compile(r"PUT /v1/assignments/[^/]+/parts/")),
    ("upload begun", re.compile(r"POST /v1/assignments/[^/]+/parts/[^/]+/uploads$")),
    ("chunk", re.compile(r"PATCH /v1/assignments/[^/]+/parts/[^/]+/uploads/")),
    ("submission", re.compile(r"POST /v1/assignments/[^/]+/submission")),
    ("progress", re.compile(r"POST /v1/assignments/[^/]+/progress")),
    ("download", re.compile(r"GET /v1/artifacts/")),
)
REQUEST_KINDS = tuple(kind for kind, _ in _KINDS)
POLL = "poll"
MOST_KEPT = 400
"""Requests that are kept, to come again when their runs are over."""


class Tamper(StrEnum):
    """What is done to a request."""

    CUT_SENDING = "cut while sending"  # A part of it reaches the API, then both sides are hung up on.
    CUT_WAITING = "cut while waiting"  # The API has it whole; nobody is there for the answer.
    CUT_RECEIVING = "cut while receiving"  # The device gets a part of the answer.
    DELAY = "delayed"
    DUPLICATE = "duplicated"  # Two of it at once; the device hears the first answer.
    REORDER = "reordered"  # It waits until a later request has overtaken it.
    REPLAY = "replayed"  # It comes again right after its answer, and again seconds later.


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    head: bytes
    body: bytes

    @property
    def line(self) -> str:
        """Method and path."""
        return self.head.split(b" HTTP/", 1)[0].decode("latin-1")

    @property
    def kind(self) -> str:
        """One of `REQUEST_KINDS`, or `other`."""
        return next((kind for kind, pattern in _KINDS if pattern.match(self.line)), "other")


@dataclass
class Seen:
    """What the API answered."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    receipts: dict[str, str] = field(default_factory=dict)
    """Assignment -> hash of the update that the API said it has."""
    faults: list[str] = field(default_factory=list)
    """Answers that must never be: 500, or a second receipt with another hash."""
    replays: Counter[str] = field(default_factory=Counter)
    """What requests that came a second time were answered: the problem's code, or the status."""
    requests: deque[Request] = field(default_factory=lambda: deque(maxlen=MOST_KEPT))
    """What devices sent and the API has had whole, without polls: those wait, and ask for nothing in particular."""

    def take_faults(self) -> list[str]:
        """Return the faults since the last call."""
        faults, self.faults = self.faults, []
        return faults

    def note(self, request: Request, status: int, body: bytes) -> None:
        """Remember an answer."""
        self.statuses[request.kind, status] += 1
        if status >= 500 and status != 503:
            self.faults.append(f"{request.line}: {status} {body[:300]!r}")
        if request.kind == "submission" and status in (200, 201):
            receipt = json.loads(body)
            known = self.receipts.setdefault(receipt["assignment_id"], receipt["update_sha256"])
            if known != receipt["update_sha256"]:
                self.faults.append(f"{request.line}: two receipts, {known} and {receipt['update_sha256']}")


class SpoilingProxy:
    """Use as a context manager: serves from a thread of its own.

    Args:
        port: of the API.
        decide: what shall become of a request; None: nothing. Called in the proxy's thread.
        seed: of the places where it cuts.
    """

    def __init__(self, port: int, decide: Callable[[Request], Tamper | None], seed: int) -> None:
        self._api_port = port
        self._decide = decide
        self._random = random.Random(seed)
        self.seen = Seen()
        self._passed: asyncio.Event
        self._tasks: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(self._serve())
        self.address = f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _serve(self) -> asyncio.Server:
        self._passed = asyncio.Event()
        return await asyncio.start_server(self._accept, HOST, 0)

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._exchange(await _read_request(reader), reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tamper = self._decide(request)
        match tamper:
            case Tamper.CUT_SENDING:
                whole = _closing(request)
                await self._send(whole[: self._random.randrange(1, len(whole))])
                return
            case Tamper.CUT_WAITING:
                await self._send(_closing(request))
                if self._random.random() < 0.5:  # the API finds nobody; or its answer is lost further on
                    return
                await self._ask(request)
                return
            case Tamper.DELAY:
                await asyncio.sleep(self._random.uniform(0.1, LONGEST_HOLD_SECONDS))
            case Tamper.REORDER:
                self._passed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._passed.wait(), LONGEST_HOLD_SECONDS)
        answer = await self._answer(request, reader, twice=tamper is Tamper.DUPLICATE)
        if tamper is not Tamper.REORDER:
            self._passed.set()
        if tamper is Tamper.CUT_RECEIVING:
            answer = answer[: self._random.randrange(1, len(answer))]
        writer.write(answer)
        await writer.drain()
        if tamper is Tamper.REPLAY:
            self._later(self._replay(request))

    async def _answer(self, request: Request, reader: asyncio.StreamReader, *, twice: bool) -> bytes:
        """Return the first answer; none (OSError) if the device hangs up before."""
        gone = asyncio.create_task(reader.read(1))
        asked = [self._later(self._ask(request)) for _ in range(2 if twice else 1)]
        done, _ = await asyncio.wait([gone, *asked], return_when=asyncio.FIRST_COMPLETED)
        if gone in done and not gone.result():
            asked[0].cancel()
            raise ConnectionResetError("the device hung up")
        gone.cancel()
        return await next(task for task in asked if task in done)

    async def _replay(self, request: Request) -> None:
        for seconds in (0.0, self._random.uniform(1.0, 3.0)):
            await asyncio.sleep(seconds)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                self.seen.replays[verdict(await self._ask(request))] += 1

    def send_again(self, requests: Iterable[Request]) -> Counter[str]:
        """Send requests that were sent before, one by one; return what came of them."""

        async def send() -> Counter[str]:
            answers: Counter[str] = Counter()
            until = self._loop.time() + SEND_AGAIN_SECONDS
            for request in requests:
                if self._loop.time() > until:
                    break
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    answers[verdict(await self._ask(request))] += 1
            return answers

        return asyncio.run_coroutine_threadsafe(send(), self._loop).result(SEND_AGAIN_SECONDS + ANSWER_SECONDS)

    def _later(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: a connection that broke is no news here

    async def _send(self, content: bytes) -> None:
        _, writer = await asyncio.open_connection(HOST, self._api_port)
        writer.write(content)
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    async def _ask(self, request: Request) -> bytes:
        """Send a request to the API and return its whole answer."""
        reader, writer = await asyncio.open_connection(HOST, self._api_port)
        try:
            writer.write(_closing(request))
            answer = await asyncio.wait_for(_read_answer(reader), ANSWER_SECONDS)
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        self.seen.note(request, int(head.split(b" ", 2)[1]), body)
        if request.kind != POLL and request not in self.seen.requests:
            self.seen.requests.append(request)
        return answer


def verdict(answer: bytes) -> str:
    """Return what an answer says: the code of its problem; without one, its status."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if status < 400:
        return str(status)
    try:
        return str(json.loads(body)["code"])
    except (ValueError, KeyError):
        return str(status)


async def _read_request(reader: asyncio.StreamReader) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    return Request(head, await reader.readexactly(_length(head)))


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    """Read an answer whose sender closes the connection after it; raise if it is cut."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        body = await reader.read()
        if not body.endswith(b"0\r\n\r\n"):
            raise ConnectionResetError("the API ended in the middle of an answer")
        return head + body
    return head + await reader.readexactly(_length(head))


def _length(head: bytes) -> int:
    found = re.search(rb"(?mi)^content-length: *(\d+)", head)
    return int(found.group(1)) if found else 0


def _closing(request: Request) -> bytes:
    """Return the request's bytes, asking the API to close the connection after its answer."""
    head = re.sub(rb"(?mi)^connection:.*\r\n", b"", request.head)
    return head[:-2] + b"Connection: close\r\n\r\n" + request.body
