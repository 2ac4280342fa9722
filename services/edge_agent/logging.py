"""Structured logs: event names and bound ids, to standard error or a file. Never data text, weights or secrets."""

import logging
import sys
from pathlib import Path
from typing import Literal

import structlog

import tracing

LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def configure(log_format: LogFormat, level: LogLevel, file: Path | None = None) -> None:
    """Send every log line of this process to standard error, or to the end of `file`."""
    stream = open(file, "a", encoding="utf-8") if file else sys.stderr  # noqa: SIM115 - open as long as the process
    renderers: list[structlog.typing.Processor]
    if log_format == "json":
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback  # others print local variables: a device's rows, for instance
        renderers = [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            tracing.add_trace_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    logging.captureWarnings(True)
    # Libraries speak through the standard library; their warnings matter, their chatter does not.
    logging.basicConfig(
        stream=stream, level=logging.WARNING, format="%(asctime)s [%(levelname)s] %(name)s: %(message)s"
    )
