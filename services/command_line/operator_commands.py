"""`cotune operator`: operators' keys, and what was done with them."""

from typing import Annotated

import typer

from command_line.connection import Format, Server, connect
from command_line.output import OutputFormat, console, print_json, print_table
from protocol.operators import AuditEntry, OperatorKey, OperatorKeyCreate, OperatorRole

app = typer.Typer(no_args_is_help=True, help="Operators' keys, and what was done with them. For admins.")
key_app = typer.Typer(no_args_is_help=True, help="Make, list and revoke operators' keys.")
app.add_typer(key_app, name="key")


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
    request = OperatorKeyCreate(name=name, role=role, expires_in_seconds=expires_in_days * 86_400)
    with connect(server) as client:
        created = client.create_operator_key(request)
    if output is OutputFormat.JSON:
        print_json(created)
        return
    out = console()
    out.print(f"Key, shown this once: [bold]{created.key}[/bold]", soft_wrap=True)
    until = f"until {created.expires_at:%Y-%m-%d %H:%M} UTC" if created.expires_at else "until it is revoked"
    out.print(
        f"{created.key_id}: {created.name}, {created.role}, {until}. Use it as COTUNE_OPERATOR_KEY.", soft_wrap=True
    )


@key_app.command("list")
def list_keys(server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """List every key, without its secret."""
    with connect(server) as client:
        keys = client.list_operator_keys()
    if output is OutputFormat.JSON:
        print_json(keys)
        return
    columns = ["Key", "Name", "Role", "Begins with", "Made by", "Good until (UTC)"]
    print_table(console(), f"{len(keys)} key(s)", columns, [_row(key) for key in keys])


@key_app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, key_….")],
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Void a key for ever, at once."""
    with connect(server) as client:
        key = client.revoke_operator_key(key_id)
    if output is OutputFormat.JSON:
        print_json(key)
        return
    console().print(f"{key.key_id} ({key.name}) is revoked.")


@app.command("audit")
def audit(
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most entries.")] = 50,
    subject: Annotated[str | None, typer.Option(help="Only what was done to this run, device, token or key.")] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Show what operators changed or tried to change, the newest first."""
    with connect(server) as client:
        entries = client.audit(limit=limit, subject=subject)
    if output is OutputFormat.JSON:
        print_json(entries)
        return
    columns = ["Time (UTC)", "Who", "What", "To what", "Outcome", "Request"]
    print_table(console(), f"{len(entries)} entries", columns, [_entry(entry) for entry in entries])


def _row(key: OperatorKey) -> list[str]:
    until = f"{key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else "it is revoked"
    return [
        key.key_id, key.name, key.role, f"{key.prefix}…", key.created_by,
        f"revoked {key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else until,
    ]  # fmt: skip


def _entry(entry: AuditEntry) -> list[str]:
    when = f"{entry.time:%Y-%m-%d %H:%M:%S}"
    return [when, f"{entry.name} ({entry.key_id})", entry.action, entry.subject or "-", entry.outcome, entry.request_id]
