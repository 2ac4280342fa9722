"""What the commands print: tables for people, JSON for programs, errors to standard error."""

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from command_line.errors import CommandError

Item = TypeVar("Item", bound=BaseModel)
Columns = Mapping[str, Callable[[Item], object]]
"""Heading of a column -> what an item shows there. Headings as `table` takes them."""

PLAIN_WIDTH = 120
"""Columns when standard output is not a terminal."""


class OutputFormat(StrEnum):
    """How a command prints its answer."""

    TABLE = "table"
    JSON = "json"


def console() -> Console:
    """Return a console on standard output, wide enough for our tables when that is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, emoji=False)


def print_item(value: Item, output: OutputFormat, describe: Callable[[Item], None]) -> None:
    """Print a schema as JSON, or let `describe` print it for a person."""
    if output is OutputFormat.JSON:
        print_json(value)
    else:
        describe(value)


def print_items(items: Sequence[Item], output: OutputFormat, noun: str, columns: Columns[Item]) -> None:
    """Print a list of schemas as JSON, or as a table under their number: `2 device(s)`."""
    if output is OutputFormat.JSON:
        print_json(items)
    else:
        print_rows(f"{len(items)} {noun}", items, columns)


def print_rows(title: str, items: Sequence[Item], columns: Columns[Item]) -> None:
    """Print a table, a row an item, under its title."""
    rows = [[cell(value(item)) for value in columns.values()] for item in items]
    print_table(console(), title, list(columns), rows)


def facts_of(item: Item, columns: Columns[Item]) -> dict[str, object]:
    """Return what a row of an item says, by name, for `print_facts`."""
    return {_heading(heading): value(item) for heading, value in columns.items()}


def print_facts(facts: Mapping[str, object]) -> None:
    """Print names and values, one pair a line."""
    width = max(map(len, facts)) + 2
    out = console()
    for name, value in facts.items():
        out.print(Text.assemble((f"{name}:".ljust(width), "bold"), cell(value)), soft_wrap=True)


def cell(value: object) -> str:
    """Return a value for a person: times without their zone, which is UTC; `-` for nothing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return ", ".join(map(cell, value)) or "-"
    return "-" if value is None or value == "" else str(value)


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
    """Return a table. The first character of a column's name is not shown where it is one of these:

    `#`: a column of numbers; `@`: of ids, which are never folded, so that they can be copied and searched for.
    """
    result = Table(header_style="bold", box=None, pad_edge=False)
    for column in columns:
        result.add_column(
            _heading(column),
            justify="right" if column.startswith("#") else "left",
            overflow="fold",
            no_wrap=column.startswith("@"),
        )
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


def _heading(column: str) -> str:
    return column[1:] if column[0:1] in ("#", "@") else column


def _dump(value: BaseModel) -> Any:
    return value.model_dump(mode="json")
