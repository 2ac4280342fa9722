"""`cotune device`: let devices in, and see them."""

from typing import Annotated

import typer

from command_line.connection import Format, Server, connect
from command_line.output import OutputFormat, console, print_json, print_table
from protocol.devices import Device, EnrolmentTokenCreate, EnrolmentTokenState

app = typer.Typer(no_args_is_help=True, help="Let devices in, and see them.")

DeviceArgument = Annotated[str, typer.Argument(help="The device's id, dev_….")]


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
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Make an enrolment token. Give it to the owner of a device; it is shown this once."""
    request = EnrolmentTokenCreate(uses=uses, expires_in_seconds=expires_in_seconds, note=note, approval=approval)
    with connect(server) as client:
        created = client.create_token(request)
        address = client.server
    if output is OutputFormat.JSON:
        print_json(created)
        return
    out = console()
    out.print(f"Token, shown this once: [bold]{created.token}[/bold]", soft_wrap=True)
    out.print(f"It lets {created.uses} device(s) in until {created.expires_at:%Y-%m-%d %H:%M} UTC. On the device:")
    out.print(
        f"  cotune-agent enroll --home FOLDER --server {address} --token {created.token}"
        " --name NAME --model MODEL --data FILE.jsonl",
        soft_wrap=True,
        markup=False,
    )


@app.command("tokens")
def list_tokens(server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """List every enrolment token, without its secret."""
    with connect(server) as client:
        tokens = client.list_tokens()
    if output is OutputFormat.JSON:
        print_json(tokens)
        return
    columns = ["Token", "Note", "Used", "Approval", "Good until (UTC)"]
    print_table(console(), f"{len(tokens)} token(s)", columns, [_token_row(each) for each in tokens])


@app.command("revoke-token")
def revoke_token(
    token_id: Annotated[str, typer.Argument(help="The token's id, tok_….")],
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Let nobody enrol with a token any more."""
    with connect(server) as client:
        token = client.revoke_token(token_id)
    if output is OutputFormat.JSON:
        print_json(token)
        return
    console().print(f"{token.token_id} is revoked; the {token.used} device(s) that enrolled with it stay.")


@app.command("approve")
def approve(device_id: DeviceArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Let a device that waits for it take part."""
    with connect(server) as client:
        _show(client.approve_device(device_id), output)


@app.command("revoke")
def revoke(device_id: DeviceArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """Void a device's credential for ever, at once; what is not being aggregated yet is not counted."""
    with connect(server) as client:
        _show(client.revoke_device(device_id), output)


@app.command("list")
def list_devices(server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """List every device: what it runs on, what it does, when it was last heard from."""
    with connect(server) as client:
        devices = client.list_devices()
    if output is OutputFormat.JSON:
        print_json(devices)
        return
    columns = ["Device", "Name", "Status", "Does", "Model", "Domain", "#Rows", "Last seen (UTC)"]
    print_table(console(), f"{len(devices)} device(s)", columns, [_row(device) for device in devices])


def _row(device: Device) -> list[str]:
    profile = device.profile
    activity = f"{device.activity}: {device.reason}" if device.reason else device.activity
    model = f"{profile.model_architecture}, {profile.model_parameters / 1e6:.1f} M"
    seen = f"{device.last_seen_at:%Y-%m-%d %H:%M:%S}"
    return [
        device.device_id, device.name, device.status, activity, model, profile.domain or "-",
        str(profile.num_examples), seen,
    ]  # fmt: skip


def _show(device: Device, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json(device)
    else:
        console().print(f"{device.device_id} ({device.name}) is {device.status}.")


def _token_row(token: EnrolmentTokenState) -> list[str]:
    until = f"{token.expires_at:%Y-%m-%d %H:%M}"
    return [
        token.token_id, token.note or "-", f"{token.used} of {token.uses}", "yes" if token.approval else "no",
        f"revoked {token.revoked_at:%Y-%m-%d %H:%M}" if token.revoked_at else until,
    ]  # fmt: skip
