"""`cotune audit`: what operators did."""

from typing import Annotated

import typer

from command_line.connection import Format, Server, connect
from command_line.output import Columns, OutputFormat, print_items
from protocol.operators import AuditEntry

app = typer.Typer(no_args_is_help=True, help="What operators changed or tried to change. For admins.")

COLUMNS: Columns[AuditEntry] = {
    "Time (UTC)": lambda each: each.time,
    "Who": lambda each: f"{each.name} ({each.key_id})",
    "What": lambda each: each.action,
    "@To what": lambda each: each.subject,
    "Outcome": lambda each: each.outcome,
    "Request": lambda each: each.request_id,
}


@app.command("list")
def list_entries(
    *,
    limit: Annotated[int, typer.Option(min=1, help="Most entries.")] = 50,
    key: Annotated[str | None, typer.Option(help="Only what this operator's key did: key_…, or `bootstrap`.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this, for example `run.stop`.")] = None,
    subject: Annotated[
        str | None, typer.Option(help="Only what was done to this run, device, token, key, federation or webhook.")
    ] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """List what operators changed or tried to change, the newest first."""
    with connect(server) as client:
        entries = client.audit(most=limit, key_id=key, action=action, subject=subject)
        print_items(entries, output, "entries", COLUMNS)
