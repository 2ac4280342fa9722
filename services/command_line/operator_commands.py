"""`cotune operator`: operators' keys."""

from typing import Annotated

import typer

from command_line.connection import Format, Server, checked, connect
from command_line.output import Columns, OutputFormat, console, print_item, print_items
from protocol.operators import OperatorKey, OperatorKeyCreate, OperatorKeyCreated, OperatorRole

app = typer.Typer(no_args_is_help=True, help="Operators and their keys. For admins.")
key_app = typer.Typer(no_args_is_help=True, help="Make, list and revoke operators' keys.")
app.add_typer(key_app, name="key")


def _end(key: OperatorKey) -> object:
    if key.revoked_at:
        return f"revoked {key.revoked_at:%Y-%m-%d %H:%M}"
    return key.expires_at or "it is revoked"


COLUMNS: Columns[OperatorKey] = {
    "@Key": lambda each: each.key_id,
    "Name": lambda each: each.name,
    "Role": lambda each: each.role,
    "Begins with": lambda each: f"{each.prefix}…",
    "Made by": lambda each: each.created_by,
    "Good until (UTC)": _end,
}


@key_app.command("create")
def create(
    name: Annotated[str, typer.Option(help="Whose key it is: a person or a program.")],
    role: Annotated[OperatorRole, typer.Option(help="What it may do.")] = OperatorRole.VIEWER,
    expires_in_days: Annotated[
        int, typer.Option("--expires-in-days", min=1, max=3650, help="Days until it is void.")
    ] = 90,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Make a key. It is shown this once."""
    request = checked(OperatorKeyCreate, name=name, role=role, expires_in_seconds=expires_in_days * 86_400)
    with connect(server) as client:
        print_item(client.create_operator_key(request), output, _introduce)


@key_app.command("list")
def list_keys(server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """List every key, without its secret."""
    with connect(server) as client:
        print_items(client.list_operator_keys(), output, "key(s)", COLUMNS)


@key_app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="The key's id, key_….")],
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Void a key for ever, at once."""
    with connect(server) as client:
        print_item(client.revoke_operator_key(key_id), output, _tell_revoked)


def _introduce(created: OperatorKeyCreated) -> None:
    out = console()
    out.print(f"Key, shown this once: [bold]{created.key}[/bold]", soft_wrap=True)
    until = f"until {created.expires_at:%Y-%m-%d %H:%M} UTC" if created.expires_at else "until it is revoked"
    out.print(
        f"{created.key_id}: {created.name}, {created.role}, {until}. Use it as COTUNE_OPERATOR_KEY.", soft_wrap=True
    )


def _tell_revoked(key: OperatorKey) -> None:
    console().print(f"{key.key_id} ({key.name}) is revoked.")
