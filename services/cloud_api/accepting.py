"""How connections are accepted: the more wait, the more at a time.

libuv, which uvloop is made of, accepts one connection in each turn of its event loop (since 1.45, libuv/libuv#3696).
After a restart every device comes back at once, and a turn of a busy process takes milliseconds: with 10,000 devices
and slow cores the queue of the socket overflowed 44,457 times, and 498 connections were reset.

Rejected: as many as wait, always. Of several processes at one socket the first to look would take them all.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from typing import Any

import structlog
import uvloop

MOST_AT_ONCE = 64
"""Accepted in a turn, at most: 2 to 3 ms on slow cores, with what opens them."""

PAUSE_SECONDS = 1.0
"""Without accepting, where the process has no descriptor left or the system no memory."""

LOOP = "cloud_api.accepting:Loop"
"""As uvicorn is told of it."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = structlog.get_logger(__name__)


class Loop(uvloop.Loop):
    """uvloop's event loop, with servers that accept several connections in a turn."""

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        *,
        sock: socket.socket,
        ssl: ssl.SSLContext | None = None,
        backlog: int,
    ) -> "_Server":
        """Serve a bound socket: what uvicorn asks for.

        Args:
            protocol_factory: makes what a connection is given to.
            sock: bound; it listens from now on. Whoever made it closes it, after the server.
            ssl: None serves plain text.
            backlog: connections that may wait to be accepted.
        """
        sock.setblocking(False)
        sock.listen(backlog)
        return _Server(self, sock, protocol_factory, ssl)


class _Server:
    """Accepts until it is closed; what it has accepted goes on. Of `asyncio.Server` it has what uvicorn uses."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._protocol_factory = protocol_factory
        self._tls = tls
        self._at_once = 1
        self._opening = set[asyncio.Task[Any]]()
        self._pause: asyncio.TimerHandle | None = None
        self._begin()

    def close(self) -> None:
        """Accept no more."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener.fileno())

    async def wait_closed(self) -> None:
        """There is nothing to wait for: connections are whose protocols they were given to."""

    def _begin(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        """Accept as many as may be in this turn; in the next one twice as many, if that was not all."""
        for _ in range(self._at_once):
            try:
                connection, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                self._at_once = 1
                return
            except ConnectionAbortedError:  # gone while it waited
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._rest(error)
                return
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
        self._at_once = min(2 * self._at_once, MOST_AT_ONCE)

    def _rest(self, error: OSError) -> None:
        """Who waits would be seen again at once, and in vain, for ever."""
        log.error("cannot_accept", error=error.strerror, again_seconds=PAUSE_SECONDS)
        self._loop.remove_reader(self._listener.fileno())
        self._pause = self._loop.call_later(PAUSE_SECONDS, self._begin)

    async def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            await self._loop.connect_accepted_socket(self._protocol_factory, connection, ssl=self._tls)
        except OSError as error:  # no handshake came of it: the other side's affair; uvloop has closed the connection
            log.debug("handshake_failed", error=str(error))
