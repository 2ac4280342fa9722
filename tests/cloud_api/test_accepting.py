"""How connections are accepted: many a turn where many wait, and none lost when the process has no descriptor left."""

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from cloud_api import accepting
from cloud_api.accepting import MOST_AT_ONCE, Loop
from cloud_api.server import bind

BACKLOG = 1024


class Greeter(asyncio.Protocol):
    """Says hello to each connection, and counts them."""

    made = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        Greeter.made += 1
        writing = cast("asyncio.WriteTransport", transport)
        writing.write(b"hello")
        writing.close()


class Flaky(socket.socket):
    """A listening socket that fails to accept as it is told to, once for each of `failing`."""

    failing: list[OSError]

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failing:
            raise self.failing.pop(0)
        return super().accept()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    Greeter.made = 0
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(coroutine)


@contextlib.contextmanager
def clients(listener: socket.socket, count: int) -> Iterator[list[socket.socket]]:
    """Connections that wait to be accepted."""
    with contextlib.ExitStack() as held:
        address = listener.getsockname()
        yield [held.enter_context(socket.create_connection(address, timeout=10)) for _ in range(count)]


async def turns_until(so: Callable[[], bool], blocked_seconds: float = 0.0) -> int:
    """How many turns of the event loop pass until it is so; each is busy for so long."""
    started, turns = time.monotonic(), 0
    while not so():
        assert time.monotonic() - started < 20
        time.sleep(blocked_seconds)
        await asyncio.sleep(0)
        turns += 1
    return turns


def test_the_more_wait_the_more_are_accepted_in_a_turn() -> None:
    async def serve() -> None:
        with bind("127.0.0.1", 0) as listener:
            server = await asyncio.get_running_loop().create_server(Greeter, sock=listener, backlog=BACKLOG)
            with clients(listener, 300) as connections:
                turns = await turns_until(lambda: Greeter.made == 300, 0.001)
                # 1, 2, 4, ... 64, 64, 64: libuv itself takes 300 turns. A connection is opened in the turns after.
                assert turns < 30
                received = await asyncio.to_thread(lambda: {each.recv(16) for each in connections})
            assert received == {b"hello"}
            server.close()

    run(serve())


def test_a_single_connection_is_not_taken_for_the_beginning_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def counted(listener: Flaky) -> tuple[socket.socket, Any]:
        nonlocal looks
        looks += 1
        return socket.socket.accept(listener)

    async def serve() -> None:
        with Flaky() as listener:
            listener.bind(("127.0.0.1", 0))
            monkeypatch.setattr(Flaky, "accept", counted)
            server = await asyncio.get_running_loop().create_server(Greeter, sock=listener, backlog=BACKLOG)
            for number in range(1, 9):
                with clients(listener, 1):
                    await turns_until(lambda number=number: Greeter.made == number)
                    await asyncio.sleep(0.01)
            server.close()

    run(serve())
    assert Greeter.made == 8
    assert looks <= 2 * 8 < MOST_AT_ONCE


def test_nobody_is_lost_while_there_is_no_descriptor_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "PAUSE_SECONDS", 0.05)

    async def serve() -> None:
        with Flaky() as listener:
            listener.failing = [
                OSError(errno.EMFILE, "Too many open files"),
                ConnectionAbortedError(errno.ECONNABORTED, "gone"),
                OSError(errno.ENOBUFS, "No buffer space available"),
            ]
            listener.bind(("127.0.0.1", 0))
            server = await asyncio.get_running_loop().create_server(Greeter, sock=listener, backlog=BACKLOG)
            with clients(listener, 20), capture_logs() as said:
                await turns_until(lambda: Greeter.made == 20)
            server.close()
            assert not listener.failing
            assert [each["error"] for each in said] == ["Too many open files", "No buffer space available"]

    run(serve())


@pytest.mark.parametrize("resting", [False, True])
def test_a_closed_server_accepts_no_more(resting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "PAUSE_SECONDS", 0.05)

    async def serve() -> None:
        with Flaky() as listener:
            listener.failing = [OSError(errno.EMFILE, "Too many open files")] if resting else []
            listener.bind(("127.0.0.1", 0))
            server = await asyncio.get_running_loop().create_server(Greeter, sock=listener, backlog=BACKLOG)
            with clients(listener, 1):
                if resting:
                    await turns_until(lambda: not listener.failing)
                server.close()
                await server.wait_closed()
                await asyncio.sleep(0.2)
                assert Greeter.made == 0

    run(serve())
