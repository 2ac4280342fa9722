"""How much is read off a connection before the application asks for it.

uvicorn's protocol takes up to 256 kB at a time, also of a body that the application has not begun to read: two hundred
uploads that wait for their turn at the database held 35 MB that might as well wait at the sender. Here little is read
until the application asks for a request's body, and more at a time from then on.

Rejected: a smaller receive buffer of the socket (`SO_RCVBUF`), which would make far connections slow.
"""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cloud_api.transfers import Transfers

UNASKED_BYTES = 16 * 1024
"""Read at once until the application asks for the body: the headers, and what of the body comes with them."""

ASKED_BYTES = 256 * 1024
"""Read at once of a body that the application reads, at most."""


def reading_little(transfers: Transfers) -> type[asyncio.Protocol]:
    """Return what a server of uvicorn's makes for each connection. It is for the connections of one event loop.

    Args:
        transfers: of the process; the more of them, the less is read at once for each.
    """
    buffer = memoryview(bytearray(ASKED_BYTES))

    def connection(**arguments: Any) -> asyncio.BufferedProtocol:
        return _Connection(_Requests(**arguments), buffer, transfers)

    return cast("type[asyncio.Protocol]", connection)


class _Flow(FlowControl):
    """Knows whether the application has asked for the body of the newest request."""

    asked = False

    def resume_reading(self) -> None:
        """Read: the application asks for the body, or has answered and what is left of it is thrown away."""
        self.asked = True
        super().resume_reading()


class _Requests(HttpToolsProtocol):
    """The requests of a connection."""

    flow: _Flow

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)

    def on_headers_complete(self) -> None:
        self.flow.asked = False
        super().on_headers_complete()

    @property
    def body_is_read(self) -> bool:
        """Whether the application reads a body of which more will come."""
        cycle = self.cycle
        return cycle is not None and cycle.more_body and not cycle.response_complete and self.flow.asked

    def data_received(self, data: bytes) -> None:
        """Parse, and stop reading where the beginning of a body is there for which nobody has asked.

        Not in `on_body`: a small body that is there as a whole must not keep the end of the connection from being seen.
        """
        super().data_received(data)
        if self.cycle is not None and self.cycle.body and self.cycle.more_body and not self.flow.asked:
            self.flow.pause_reading()


class _Connection(asyncio.BufferedProtocol):
    """Gives the connection's bytes to the parser, which copies what it keeps.

    Not the same object as `_Requests`: uvloop asks none for its buffer that is an `asyncio.Protocol`.

    Args:
        buffer: that of all connections: it is filled and parsed before the next is read from.
        transfers: of the process.
    """

    def __init__(self, requests: _Requests, buffer: memoryview, transfers: Transfers) -> None:
        self._requests = requests
        self._transfers = transfers
        self._buffer = buffer
        self._little = buffer[:UNASKED_BYTES]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writing = cast("asyncio.Transport", transport)
        self._requests.connection_made(writing)
        # Blocks are large already. What the socket does not take is held by uvloop: one block, not one and more. With 0
        # its TLS would never write.
        writing.set_write_buffer_limits(high=1, low=0)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[: self._transfers.block_bytes] if self._requests.body_is_read else self._little

    def buffer_updated(self, nbytes: int) -> None:
        self._requests.data_received(cast("bytes", self._buffer[:nbytes]))

    def eof_received(self) -> None:
        self._requests.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._requests.connection_lost(exc)

    def pause_writing(self) -> None:
        self._requests.pause_writing()

    def resume_writing(self) -> None:
        self._requests.resume_writing()
