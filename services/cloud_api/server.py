"""Runs the application under uvicorn: our socket, our logs, our way to stop."""

import asyncio
import contextlib
import errno
import signal
import socket
import ssl
import sys

import uvicorn
from fastapi import FastAPI

from cloud_api.accepting import LOOP
from cloud_api.cloud import Cloud
from cloud_api.reading import reading_little

GRACE_SECONDS = 2
"""From the signal to the cut of requests that still run (uploads, downloads); waiting ends at once."""

BACKLOG = 65_535
"""Connections that may wait to be accepted, as far as the system's `net.core.somaxconn` lets them.

After a restart every device comes back at once. Linux answers those that find no room with SYN cookies, of which it
refused 867 where 10,000 devices came to a busy machine within ten seconds, there was room for 2,048, and connections
were accepted one at a time (`cloud_api.accepting`).
"""


class CannotListen(Exception):
    """The address cannot be listened on; the message says why."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address. Nobody can connect before the server listens on it.

    Raises:
        CannotListen: it is in use, or it is not an address of this machine.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:
        raise CannotListen(f"expected an address of this machine as --host, got {host!r}: {error}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        listener.bind(address)
        # Linux lets two sockets that do not listen yet bind one address: only listening tells.
        listener.listen(1)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            detail = "is in use by another process; stop it, or choose another with --port"
            raise CannotListen(f"port {port} on {host} {detail}") from None
        raise CannotListen(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def address_of(listener: socket.socket, scheme: str = "http") -> str:
    """Return the address under which a browser finds a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def announce(listener: socket.socket, scheme: str) -> None:
    """Print the address to standard output."""
    address = address_of(listener, scheme)
    sys.stdout.write(f"Cotune API on {address}, documentation on {address}/docs\n")
    sys.stdout.flush()


class Server(uvicorn.Server):
    """Says its address when it is up, and ends what waits before it waits for what runs.

    Args:
        lifeline: a descriptor that ends when the parent does, in a process that is one of several
            (`cloud_api.processes`); that process announces nothing and ends with its parent.
    """

    def __init__(self, config: uvicorn.Config, cloud: Cloud, lifeline: int | None = None) -> None:
        super().__init__(config)
        self._cloud = cloud
        self._lifeline = lifeline

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then print the address to standard output."""
        await super().startup(sockets)
        if self._lifeline is not None:
            asyncio.get_running_loop().add_reader(self._lifeline, self._end_with_parent)
            return
        for listener in sockets or []:
            announce(listener, "https" if self.config.is_ssl else "http")

    def _end_with_parent(self) -> None:
        assert self._lifeline is not None
        asyncio.get_running_loop().remove_reader(self._lifeline)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wake long polls and event streams, then stop as uvicorn does."""
        self._cloud.feed.stop()
        await super().shutdown(sockets)
        if self.force_exit:  # a second interrupt skips the connections; what the application holds is still put down
            await self.lifespan.shutdown()


def serve(app: FastAPI, cloud: Cloud, listener: socket.socket, lifeline: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT, or until `lifeline` ends (see `Server`)."""
    tls = cloud.settings.tls
    config = uvicorn.Config(
        app,
        loop=LOOP,
        http=reading_little(cloud.transfers),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # `create_app` reads them, from the proxies that the settings name and from nobody else
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
        ssl_ca_certs=str(tls.client_ca) if tls and tls.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
        timeout_keep_alive=75,  # longer than clients keep a connection, so that they close it, not we in their face
        timeout_graceful_shutdown=GRACE_SECONDS,
        backlog=BACKLOG,
    )
    # uvicorn handles both signals while it serves and raises them again at the end: then they are nothing new.
    # Ignored, and not handled by nothing: the interpreter gives up what it handles before its process ends.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    with contextlib.closing(listener):
        Server(config, cloud, lifeline).run([listener])
