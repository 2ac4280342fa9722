"""The life of the process: `python -m cloud_api --host 127.0.0.1 --port 8000`.

Exit codes: 0 stopped as asked, 1 a fault, 2 settings that cannot be used (also: the port is taken, the home folder
cannot be written, the database does not answer).
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloud_api.settings import Settings

EXIT_FAULT = 1
EXIT_SETTINGS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m cloud_api", description="Serve Cotune's HTTP API.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    options = parser.parse_args(arguments)

    from cloud_api import logging
    from cloud_api.server import CannotListen, bind
    from cloud_api.settings import Settings
    from persistence.errors import StorageError
    from protocol.errors import DomainError

    try:
        settings = Settings.from_environment(os.environ)
        logging.configure(settings.log_format, settings.log_level)
        return _serve(settings, bind(options.host, options.port))
    except (ValueError, OSError, CannotListen, StorageError, DomainError) as error:
        sys.stderr.write(f"cloud_api: {error}\n")
        return EXIT_SETTINGS


def _serve(settings: "Settings", listener: socket.socket) -> int:
    from sqlalchemy.exc import OperationalError

    from cloud_api.app import create_app
    from cloud_api.cloud import open_cloud
    from cloud_api.server import serve
    from persistence import schema
    from persistence.errors import StorageError

    try:
        schema.upgrade(settings.database_url)
    except OperationalError as error:
        reason = str(error.orig).strip().splitlines()
        raise StorageError(f"the database does not answer: {reason[0] if reason else 'no reason given'}") from None
    cloud = open_cloud(settings)
    serve(create_app(cloud), cloud, listener)
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
