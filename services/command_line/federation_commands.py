"""`cotune federation`: which devices train together."""

from typing import Annotated

import typer
from pydantic import BaseModel

from command_line.connection import Format, Server, checked, connect
from command_line.device_commands import DEVICE_COLUMNS, DeviceArgument
from command_line.output import Columns, OutputFormat, console, facts_of, print_facts, print_item, print_items
from protocol.federations import Federation, FederationChange, FederationCreate

app = typer.Typer(no_args_is_help=True, help="Which devices train together.")

NameArgument = Annotated[str, typer.Argument(metavar="FEDERATION", help="The federation's name.")]
Description = Annotated[str, typer.Option(help="What it is, for operators.")]

COLUMNS: Columns[Federation] = {
    "@Federation": lambda each: each.name,
    "#Devices": lambda each: each.num_devices,
    "#Runs": lambda each: each.num_runs,
    "Description": lambda each: each.description,
    "Created (UTC)": lambda each: each.created_at,
}


class Deleted(BaseModel):
    """What `delete` says as JSON; the API says nothing."""

    deleted: str


@app.command("create")
def create(
    name: NameArgument, description: Description = "", server: Server = None, output: Format = OutputFormat.TABLE
) -> None:
    """Make a federation without devices. They come by tokens (`device token --federation`), or one by one."""
    request = checked(FederationCreate, name=name, description=description)
    with connect(server) as client:
        print_item(client.create_federation(request), output, _describe)


@app.command("list")
def list_federations(server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """List every federation with the numbers of its devices and runs."""
    with connect(server) as client:
        print_items(client.list_federations(), output, "federation(s)", COLUMNS)


@app.command("show")
def show(name: NameArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Show a federation; the table also has its devices (as JSON: `device list --federation`)."""
    with connect(server) as client:
        federation = client.get_federation(name)
        print_item(federation, output, _describe)
        if output is OutputFormat.TABLE:
            print_items(client.list_devices(federation=name), output, "device(s)", DEVICE_COLUMNS)


@app.command("change")
def change(
    name: NameArgument, description: Description, server: Server = None, output: Format = OutputFormat.TABLE
) -> None:
    """Change a federation's description. Its name stays."""
    request = checked(FederationChange, description=description)
    with connect(server) as client:
        print_item(client.change_federation(name, request), output, _describe)


@app.command("delete")
def delete(name: NameArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Delete a federation that has no runs and that no usable token names. Its devices stay."""
    with connect(server) as client:
        client.delete_federation(name)
    print_item(Deleted(deleted=name), output, lambda each: console().print(f"{each.deleted} is deleted."))


@app.command("add-device")
def add_device(
    name: NameArgument, device_id: DeviceArgument, server: Server = None, output: Format = OutputFormat.TABLE
) -> None:
    """Let a device take part in this federation's runs too."""
    with connect(server) as client:
        print_item(client.add_device(name, device_id), output, _describe)


@app.command("remove-device")
def remove_device(
    name: NameArgument, device_id: DeviceArgument, server: Server = None, output: Format = OutputFormat.TABLE
) -> None:
    """Give a device no more work of this federation; what it is doing it may finish."""
    with connect(server) as client:
        print_item(client.remove_device(name, device_id), output, _describe)


def _describe(federation: Federation) -> None:
    print_facts(facts_of(federation, COLUMNS))
