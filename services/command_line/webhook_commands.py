"""`cotune webhook`: servers that are told of events."""

from typing import Annotated

import typer

from command_line.connection import Format, Server, checked, connect
from command_line.output import Columns, OutputFormat, console, facts_of, print_facts, print_item, print_items
from protocol.events import EventType
from protocol.webhooks import CreatedWebhook, Webhook, WebhookCreate

app = typer.Typer(no_args_is_help=True, help="Servers of yours that are told of events as they happen.")

WebhookArgument = Annotated[str, typer.Argument(metavar="WEBHOOK", help="The webhook's id, whk_….")]

COLUMNS: Columns[Webhook] = {
    "@Webhook": lambda each: each.webhook_id,
    "Address": lambda each: each.url,
    "Active": lambda each: each.active,
    "Run": lambda each: each.run_id or "all",
    "#Told up to": lambda each: each.sequence,
    "#Failures": lambda each: each.failures,
    "Last error": lambda each: each.last_error,
    "Delivered (UTC)": lambda each: each.delivered_at,
}


@app.command("create")
def create(
    *,
    url: Annotated[str, typer.Argument(metavar="URL", help="Gets one POST an event.")],
    types: Annotated[
        list[EventType] | None,
        typer.Option("--type", metavar="TYPE", help="Only these, for example run.status_changed; repeat for several."),
    ] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="Only events of this run.")] = None,
    note: Annotated[str, typer.Option(help="A note for operators.")] = "",
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Have events sent to a server of yours from now on. The secret is shown this once. For admins."""
    request = checked(WebhookCreate, url=url, types=types or None, run_id=run_id, note=note)
    with connect(server) as client:
        print_item(client.create_webhook(request), output, _introduce)


@app.command("list")
def list_webhooks(server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """List every webhook and how its deliveries go."""
    with connect(server) as client:
        print_items(client.list_webhooks(), output, "webhook(s)", COLUMNS)


@app.command("show")
def show(webhook_id: WebhookArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Show a webhook: up to which event it was told, and why it fails if it does."""
    with connect(server) as client:
        print_item(client.get_webhook(webhook_id), output, _describe)


@app.command("resume")
def resume(webhook_id: WebhookArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Try a webhook again now, from the first event that it has not been told of."""
    with connect(server) as client:
        print_item(client.resume_webhook(webhook_id), output, _describe)


@app.command("delete")
def delete(webhook_id: WebhookArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Tell a webhook nothing any more, at once. For admins."""
    with connect(server) as client:
        print_item(
            client.delete_webhook(webhook_id),
            output,
            lambda each: console().print(f"{each.webhook_id} ({each.url}) is deleted.", soft_wrap=True, markup=False),
        )


def _introduce(created: CreatedWebhook) -> None:
    console().print(f"Secret, shown this once: [bold]{created.secret}[/bold]", soft_wrap=True)
    _describe(created)


def _describe(webhook: Webhook) -> None:
    print_facts(
        facts_of(webhook, COLUMNS)
        | {
            "Types": webhook.types or "all",
            "Note": webhook.note,
            "Next attempt (UTC)": webhook.next_attempt_at,
            "Created (UTC)": webhook.created_at,
        }
    )
