"""The life of the process: `python -m worker` trains, `python -m worker --controller` sweeps.

`--check` only looks whether a process with these settings could work, for health checks.

Exit codes: `protocol.exit_codes`.
"""

import argparse
import os
import platform
import secrets
import sys
import threading
from collections.abc import Sequence

import structlog

import tracing
from protocol.exit_codes import ServiceExit
from worker.stopping import block_signals, end_process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    parser.add_argument("--controller", action="store_true", help="run the sweep, which needs no torch")
    parser.add_argument(
        "--check", action="store_true", help="say whether database, blobs and queue can be used, and end"
    )
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
    try:
        tracing.start("cotune-controller" if options.controller else "cotune-worker", os.environ)
    except tracing.TracingUnavailable as error:
        return _refuse(error)
    if options.check:
        from worker.readiness import problems

        found = problems(settings)
        sys.stdout.write("".join(f"{each}\n" for each in found) or "ok\n")
        return ServiceExit.FAULT if found else ServiceExit.STOPPED

    from persistence.errors import StorageError
    from worker.processes import run_controller, run_trainer

    stop = threading.Event()
    owner = f"{platform.node()}:{os.getpid()}:{secrets.token_hex(4)}"
    structlog.contextvars.bind_contextvars(owner=owner)
    try:
        return run_controller(settings, owner, stop) if options.controller else run_trainer(settings, owner, stop)
    except StorageError as error:
        return _refuse(error)
    finally:
        tracing.flush()


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"worker: {error}\n")
    return ServiceExit.SETTINGS


if __name__ == "__main__":
    end_process(main())
