"""`cotune device`: let devices in, and see them."""

from typing import Annotated

import typer

from command_line.connection import Format, Server, checked, connect
from command_line.output import Columns, OutputFormat, bytes_text, console, print_facts, print_item, print_items
from protocol.devices import Device, EnrolmentToken, EnrolmentTokenCreate, EnrolmentTokenState
from protocol.federations import DEFAULT_FEDERATION
from protocol.statuses import DeviceStatus

app = typer.Typer(no_args_is_help=True, help="Let devices in, and see them.")

DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="The device's id, dev_….")]


def _activity(device: Device) -> str:
    return f"{device.activity}: {device.reason}" if device.reason else device.activity


def _model(device: Device) -> str:
    return f"{device.profile.model_architecture}, {device.profile.model_parameters / 1e6:.1f} M"


DEVICE_COLUMNS: Columns[Device] = {
    "@Device": lambda each: each.device_id,
    "Name": lambda each: each.name,
    "Status": lambda each: each.status,
    "Does": _activity,
    "Model": _model,
    "Domain": lambda each: each.profile.domain,
    "#Rows": lambda each: each.profile.num_examples,
    "Last seen (UTC)": lambda each: each.last_seen_at,
}
TOKEN_COLUMNS: Columns[EnrolmentTokenState] = {
    "@Token": lambda each: each.token_id,
    "Note": lambda each: each.note,
    "Used": lambda each: f"{each.used} of {each.uses}",
    "Approval": lambda each: each.approval,
    "Good until (UTC)": lambda each: (
        each.expires_at if each.revoked_at is None else f"revoked {each.revoked_at:%Y-%m-%d %H:%M}"
    ),
}


@app.command("token")
def token(
    *,
    uses: Annotated[int, typer.Option(min=1, max=100_000, help="How many devices may enrol with it.")] = 1,
    expires_in_seconds: Annotated[
        int, typer.Option("--expires-in", min=60, max=31_536_000, help="Seconds until it is void.")
    ] = 86_400,
    note: Annotated[str, typer.Option(help="A note for yourself; devices never see it.")] = "",
    approval: Annotated[
        bool, typer.Option("--approval", help="Its devices wait until `cotune device approve` lets them in.")
    ] = False,
    federations: Annotated[
        list[str] | None,
        typer.Option("--federation", help=f"Which its devices belong to; repeat for several. [{DEFAULT_FEDERATION}]"),
    ] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Make an enrolment token. Give it to the owner of a device; it is shown this once."""
    request = checked(
        EnrolmentTokenCreate,
        uses=uses,
        expires_in_seconds=expires_in_seconds,
        note=note,
        approval=approval,
        federations=federations or [DEFAULT_FEDERATION],
    )
    with connect(server) as client:
        created = client.create_token(request)
        print_item(created, output, lambda each: _introduce(each, client.server))


@app.command("tokens")
def list_tokens(server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """List every enrolment token, without its secret."""
    with connect(server) as client:
        print_items(client.list_tokens(), output, "token(s)", TOKEN_COLUMNS)


@app.command("revoke-token")
def revoke_token(
    token_id: Annotated[str, typer.Argument(metavar="TOKEN", help="The token's id, tok_….")],
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Let nobody enrol with a token any more."""
    with connect(server) as client:
        print_item(client.revoke_token(token_id), output, _tell_token)


@app.command("list")
def list_devices(
    status: Annotated[DeviceStatus | None, typer.Option(help="Only devices in this status.")] = None,
    federation: Annotated[str | None, typer.Option(help="Only devices of this federation.")] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """List every device: what it runs on, what it does, when it was last heard from."""
    with connect(server) as client:
        print_items(client.list_devices(status=status, federation=federation), output, "device(s)", DEVICE_COLUMNS)


@app.command("show")
def show(device_id: DeviceArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Show a device: its machine, its model, its federations, what it does and whether it signs its requests."""
    with connect(server) as client:
        print_item(client.get_device(device_id), output, _describe)


@app.command("approve")
def approve(device_id: DeviceArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Let a device that waits for it take part."""
    with connect(server) as client:
        print_item(client.approve_device(device_id), output, _tell)


@app.command("revoke")
def revoke(device_id: DeviceArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Void a device's credential for ever, at once; what is not being aggregated yet is not counted.

    A credential is replaced on the device itself: `cotune-agent rotate-credential`.
    """
    with connect(server) as client:
        print_item(client.revoke_device(device_id), output, _tell)


def _introduce(created: EnrolmentToken, server: str) -> None:
    out = console()
    out.print(f"Token, shown this once: [bold]{created.token}[/bold]", soft_wrap=True)
    out.print(f"It lets {created.uses} device(s) in until {created.expires_at:%Y-%m-%d %H:%M} UTC. On the device:")
    out.print(
        f"  cotune-agent enroll --home FOLDER --server {server} --token {created.token}"
        " --name NAME --model MODEL --data FILE.jsonl",
        soft_wrap=True,
        markup=False,
    )


def _tell_token(token: EnrolmentTokenState) -> None:
    console().print(f"{token.token_id} is revoked; the {token.used} device(s) that enrolled with it stay.")


def _tell(device: Device) -> None:
    console().print(f"{device.device_id} ({device.name}) is {device.status}.")


def _describe(device: Device) -> None:
    profile = device.profile
    rank = "any" if profile.max_adapter_rank is None else str(profile.max_adapter_rank)
    print_facts(
        {
            "Device": f"{device.device_id} ({device.name})",
            "Status": device.status,
            "Does": _activity(device),
            "Federations": device.federations,
            "Model": f"{profile.model_name}: {_model(device)}; {profile.tokenizer_kind}",
            "Data": f"{profile.num_examples} rows, domain {profile.domain or '-'}",
            "Machine": f"{profile.platform}, {profile.cpu_count} CPUs, {bytes_text(profile.memory_bytes)}",
            "Accelerator": profile.accelerator,
            "Highest rank": rank,
            "Agent": profile.agent_version,
            "Signs": "no" if device.public_key is None else "yes, Ed25519",
            "Enrolled (UTC)": device.enrolled_at,
            "Last seen (UTC)": device.last_seen_at,
        }
    )
