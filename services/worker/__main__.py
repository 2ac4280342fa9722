"""The life of the process: `python -m worker` trains, `python -m worker --controller` sweeps.

Exit codes: 0 stopped as asked, 1 a fault, 2 settings, or something that they name, cannot be used.
"""

import argparse
import os
import platform
import secrets
import sys
import threading
from collections.abc import Sequence

import structlog

from worker.stopping import block_signals, end_process

EXIT_SETTINGS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    parser.add_argument("--controller", action="store_true", help="run the sweep, which needs no torch")
    options = parser.parse_args(arguments)

    block_signals()  # before any thread: imports below may start some
    from worker import logging
    from worker.settings import Settings, prepare_folders

    try:
        settings = Settings.from_environment(os.environ)
        prepare_folders(settings)
    except (ValueError, OSError) as error:
        return _refuse(error)
    logging.configure(settings.log_format)

    from persistence.errors import StorageError
    from worker.processes import run_controller, run_trainer

    stop = threading.Event()
    owner = f"{platform.node()}:{os.getpid()}:{secrets.token_hex(4)}"
    structlog.contextvars.bind_contextvars(owner=owner)
    try:
        return run_controller(settings, owner, stop) if options.controller else run_trainer(settings, owner, stop)
    except StorageError as error:
        return _refuse(error)


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"worker: {error}\n")
    return EXIT_SETTINGS


if __name__ == "__main__":
    end_process(main())
