"""The life of the process: `python -m cloud_api --host 127.0.0.1 --port 8000`.

`--migrate` brings the database's schema up to date and ends; a start without it does so too, before it serves.

Exit codes: `protocol.exit_codes`. Settings that cannot be used are also a port that is taken, a home folder that cannot
be written, a database that does not answer.
"""

import argparse
import gc
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tracing
from cloud_api.allocator import share_arenas
from protocol.exit_codes import ServiceExit

if TYPE_CHECKING:
    from cloud_api.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m cloud_api", description="Serve Cotune's HTTP API.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--migrate", action="store_true", help="only bring the database's schema up to date, and end")
    parser.add_argument("--socket", type=int, help=argparse.SUPPRESS)  # one of several processes: see `processes`
    options = parser.parse_args(arguments)
    share_arenas()

    from cloud_api import logging
    from cloud_api.server import CannotListen, bind
    from cloud_api.settings import Settings
    from persistence.errors import StorageError
    from protocol.errors import DomainError

    try:
        settings = Settings.from_environment(os.environ)
        logging.configure(settings.log_format, settings.log_level)
        tracing.start("cotune-api", os.environ)
        if options.socket is not None:
            return _serve(settings, socket.socket(fileno=options.socket), lifeline=sys.stdin.fileno())
        if options.migrate:
            return _migrate(settings)
        listener = bind(options.host, options.port)
        _migrate(settings)
        return _serve_together(settings, listener) if settings.processes > 1 else _serve(settings, listener)
    except (ValueError, OSError, CannotListen, StorageError, DomainError) as error:
        sys.stderr.write(f"cloud_api: {error}\n")
        return ServiceExit.SETTINGS


def _migrate(settings: "Settings") -> int:
    from sqlalchemy.exc import OperationalError

    from persistence import schema
    from persistence.errors import StorageError

    try:
        schema.upgrade(settings.database_url)
    except OperationalError as error:
        reason = str(error.orig).strip().splitlines()
        raise StorageError(f"the database does not answer: {reason[0] if reason else 'no reason given'}") from None
    return 0


def _serve(settings: "Settings", listener: socket.socket, lifeline: int | None = None) -> int:
    from cloud_api.app import create_app
    from cloud_api.cloud import open_cloud
    from cloud_api.server import serve

    cloud = open_cloud(settings)
    app = create_app(cloud)
    gc.freeze()  # all of it is needed to the end: the collector need not look through it again and again
    serve(app, cloud, listener, lifeline)
    tracing.flush()
    return 0


def _serve_together(settings: "Settings", listener: socket.socket) -> int:
    from cloud_api.processes import serve_in_processes
    from cloud_api.server import BACKLOG, announce

    listener.listen(BACKLOG)  # who connects from now on waits for the first process
    announce(listener, "https" if settings.tls else "http")
    return serve_in_processes(settings.processes, listener, hopeless_exit_code=ServiceExit.SETTINGS)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
