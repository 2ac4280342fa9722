"""docs/commands.md has every command of `cotune`, its arguments, options, role and requests, and nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from cloud_api.access import ACCESS
from command_line.exit_codes import ExitCode
from command_line.main import app
from protocol.operators import OperatorRole

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
OPERATION = re.compile(r"`((?:GET|HEAD|POST|PUT|PATCH|DELETE) /[^`]+)`")
COMMON = {"--server", "--format", "--help"}


class Row(NamedTuple):
    """A row of the page: the command line, the role, the operations."""

    usage: str
    role: str
    operations: list[str]


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


EVERY = dict(commands(typer.main.get_command(app), "cotune"))


def rows() -> dict[str, Row]:
    found = {}
    for usage, role, operations in re.findall(r"^\| `(cotune .*?)` \| .*? \| ?(\w*) \|(.*)\|$", PAGE, re.MULTILINE):
        name = re.match(r"cotune(?: [a-z][a-z-]*)+", usage)
        assert name is not None
        assert name[0] not in found, usage
        found[name[0]] = Row(usage, role, OPERATION.findall(operations))
    return found


ROWS = rows()


def test_it_has_every_command_and_no_other() -> None:
    assert set(ROWS) == set(EVERY)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_commands_arguments_and_options_are_those_of_the_code(name: str) -> None:
    usage, parameters = ROWS[name].usage, EVERY[name].params
    arguments = [each for each in parameters if each.param_type_name == "argument"]
    before_options = re.split(r" \[?--", usage)[0]
    assert before_options.split()[len(name.split()) :] == [each.metavar or each.name.upper() for each in arguments]
    options = {each.opts[0]: each for each in parameters if each not in arguments and not set(each.opts) & COMMON}
    assert set(re.findall(r"--[a-z-]+", usage)) == set(options)
    for written, option in options.items():
        told = re.search(rf"(\[?){written}\b([^\]\[]*)", usage)
        assert told is not None
        assert (told[1] == "") == option.required, written
        assert ("…" in told[2]) == option.multiple, written
        assert (told[2].strip() == "") == option.is_flag, written


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_commands_role_is_that_of_its_operations(name: str) -> None:
    row = ROWS[name]
    roles = [ACCESS[each].role for each in row.operations]
    assert row.role == max(filter(None, roles), key=list(OperatorRole).index, default="")


def test_every_operation_of_operators_has_a_command_or_says_why_not() -> None:
    without = OPERATION.findall(PAGE.partition("\n## Without a command\n")[2])
    with_a_command = {each for row in ROWS.values() for each in row.operations}
    assert not with_a_command & set(without)
    assert with_a_command | set(without) == {each for each, access in ACCESS.items() if access.role is not None}


def test_the_exit_codes_are_those_of_the_code() -> None:
    assert [int(each) for each in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)] == [each.value for each in ExitCode]
