"""`cotune`: the command line of operators and newcomers."""

import sys
from collections.abc import Callable
from importlib.metadata import version
from inspect import cleandoc
from typing import Annotated

import typer

from command_line import (
    audit_commands,
    demo_command,
    device_commands,
    federation_commands,
    model_commands,
    operator_commands,
    pretrain_command,
    round_commands,
    run_commands,
    seed_command,
    simulate_command,
    up_command,
    update_commands,
    webhook_commands,
)
from command_line.errors import CommandError
from command_line.exit_codes import ExitCode
from command_line.output import print_error

EPILOG = (
    "Exit codes: 0 done; 1 the run failed; 2 no connection or not allowed; 3 timed out; 4 wrong input; 130 interrupted."
)

app = typer.Typer(
    name="cotune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    help="Co-tune a large language model in the cloud with the small language models on people's devices."
    " New here? Run [bold]cotune demo[/bold].",
)


def _help_of(command: Callable[..., object]) -> str:
    """A command's docstring with each paragraph on one line: Typer would end its lines where the source does."""
    return "\n\n".join(" ".join(each.split()) for each in cleandoc(command.__doc__ or "").split("\n\n"))


app.command("demo", help=_help_of(demo_command.demo))(demo_command.demo)
app.command("demo-seed", help=_help_of(seed_command.demo_seed))(seed_command.demo_seed)
app.command("pretrain", help=_help_of(pretrain_command.pretrain))(pretrain_command.pretrain)
app.command("simulate", help=_help_of(simulate_command.simulate))(simulate_command.simulate)
app.command("up", help=_help_of(up_command.up))(up_command.up)
app.add_typer(run_commands.app, name="run")
app.add_typer(round_commands.app, name="round")
app.add_typer(update_commands.app, name="update")
app.add_typer(model_commands.app, name="model")
app.add_typer(device_commands.app, name="device")
app.add_typer(federation_commands.app, name="federation")
app.add_typer(webhook_commands.app, name="webhook")
app.add_typer(operator_commands.app, name="operator")
app.add_typer(audit_commands.app, name="audit")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("cotune"))
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and exit with one of `ExitCode`."""
    try:
        app()
    except CommandError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        # Typer ends a wrong command line with 2, which here means "no connection"; no command of ours exits with 2.
        sys.exit(ExitCode.BAD_INPUT if ended.code == 2 else ended.code)
