"""What holds for every command that talks to the API: its options, and how it ends where the API is away or says no."""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import typer

from command_line.exit_codes import ExitCode
from command_line.main import app
from command_line.ports import free_port
from command_line.transport import NEXT_STEPS
from tests.command_line.conftest import Cotune

ALONE = {"demo", "demo-seed", "pretrain", "simulate", "up"}
"""They start an API, wait for one by themselves, or need none."""

ARGUMENTS = {
    "FILE.toml": "{file}",
    "URL": "https://ops.example",
    "[VERSION]": "1",
    "VERSION": "1",
    "ROUND": "1",
}
"""Something for each argument that is more than an id."""


def commands(group: Any, *path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield " ".join([*path, name]), command


def is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


EVERY = dict(commands(typer.main.get_command(app)))
TALKING = sorted(set(EVERY) - ALONE)
MAKING = {"run create", "federation create", "webhook create"}
"""What they take is not an id."""
WITH_AN_ID = [each for each in TALKING if each not in MAKING and any(map(is_argument, EVERY[each].params))]


def call_of(name: str, file: str) -> list[str]:
    """Return a command line for a command, with something for each argument and option that it needs."""
    needed = [each for each in EVERY[name].params if each.required or is_argument(each)]
    given = [
        ARGUMENTS.get(str(each.metavar), "none-0").format(file=file) if is_argument(each) else f"--{each.name}=none"
        for each in needed
    ]
    return [*name.split(), *given]


@pytest.fixture
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("run") / "run.toml"
    path.write_text('name = "x"\n')
    return str(path)


@pytest.mark.parametrize("name", TALKING)
def test_it_prints_json_too_and_says_what_it_does(name: str) -> None:
    options = {option for each in EVERY[name].params for option in each.opts}
    assert {"--format", "--server"} <= options
    assert EVERY[name].help
    assert all(getattr(each, "help", None) for each in EVERY[name].params if each.name != "help")


@pytest.mark.parametrize("name", TALKING)
def test_a_server_that_is_away_ends_in_2_and_prints_nothing(connected: Cotune, name: str, file: str) -> None:
    ended = connected(*call_of(name, file), "--server", f"http://127.0.0.1:{free_port()}")
    assert ended.code == ExitCode.CONNECTION_OR_AUTHORISATION, ended.err
    assert "cannot reach the API" in ended.err
    assert "next: start it with `cotune up`" in ended.err
    assert ended.out == ""


@pytest.mark.parametrize("name", WITH_AN_ID)
def test_an_id_that_is_not_there_ends_in_4_with_the_next_step(connected: Cotune, name: str, file: str) -> None:
    ended = connected(*call_of(name, file))
    assert ended.code == ExitCode.BAD_INPUT
    assert "none-0" in ended.err
    assert "next: `cotune " in ended.err
    assert ended.out == ""


def test_every_command_that_an_error_names_is_there() -> None:
    named = set(chain.from_iterable(re.findall(r"`cotune ([a-z -]+)`", each) for each in NEXT_STEPS.values()))
    assert len(named) > 5
    assert named <= set(EVERY)
