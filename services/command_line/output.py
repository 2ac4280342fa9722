"""What the commands print: tables for people, JSON for programs, errors to standard error."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from command_line.errors import CommandError

PLAIN_WIDTH = 120
"""Columns when standard output is not a terminal."""


class OutputFormat(StrEnum):
    """How a command prints its answer."""

    TABLE = "table"
    JSON = "json"


def console() -> Console:
    """Return a console on standard output, wide enough for our tables when that is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, emoji=False)


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """Print a schema, or a list of them, as JSON."""
    data: Any = value.model_dump(mode="json") if isinstance(value, BaseModel) else [_dump(each) for each in value]
    Console(soft_wrap=True).print_json(data=data, highlight=sys.stdout.isatty())


def print_error(error: CommandError) -> None:
    """Print what happened, and what to do next, to standard error."""
    stderr = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    stderr.print(Text.assemble(("error: ", "bold red"), error.message))
    if error.next_step:
        stderr.print(Text.assemble(("next: ", "bold"), error.next_step))


def print_table(out: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table under its title, which may be wider than the table."""
    out.print(Text(title, style="bold underline"))
    out.print(table(columns, rows))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a table; a column of numbers is one whose name starts with `#`, which is not shown."""
    result = Table(header_style="bold", box=None, pad_edge=False)
    for column in columns:
        numeric = column.startswith("#")
        result.add_column(column.removeprefix("#"), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(str(value)) if not isinstance(value, Text) else value for value in row))
    return result


def bytes_text(count: int) -> str:
    """Return a number of bytes for a person: `999 B`, `1.2 kB`, `3.4 MB`; powers of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def seconds_text(seconds: float) -> str:
    """Return a duration for a person: `8 s`, `2 min 05 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def _dump(value: BaseModel) -> Any:
    return value.model_dump(mode="json")
