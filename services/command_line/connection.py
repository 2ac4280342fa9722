"""The options that every command which talks to the API has, and the client they make."""

from typing import Annotated

import typer

from command_line.api_client import ApiClient
from command_line.folders import operator_key, server_address, tls_context
from command_line.output import OutputFormat

Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        help="Address of the API. Default: $COTUNE_SERVER, else where `cotune up` was last started on this machine,"
        " else http://127.0.0.1:8000.",
        show_default=False,
    ),
]
Format = Annotated[OutputFormat, typer.Option("--format", help="`table` for people, `json` for programs.")]


def connect(server: str | None) -> ApiClient:
    """Return a client for `server`, or for the default one, with the operator key of this machine."""
    return ApiClient(server or server_address(), operator_key(), tls=tls_context())
