"""The options that every command which talks to the API has, and the client they make."""

from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError

from command_line.api_client import ApiClient
from command_line.errors import BadInput
from command_line.folders import operator_key, server_address, tls_context
from command_line.output import OutputFormat
from protocol.base import RequestModel

Request = TypeVar("Request", bound=RequestModel)
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
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `cotune run list` shows it.")]


def connect(server: str | None) -> ApiClient:
    """Return a client for `server`, or for the default one, with the operator key of this machine."""
    return ApiClient(server or server_address(), operator_key(), tls=tls_context())


def checked(schema: type[Request], **values: Any) -> Request:
    """Return a request made of options, checked as the API would check it.

    Raises:
        BadInput: names every option that does not fit, with what was expected and what came.
    """
    try:
        return schema(**values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}, got {each['input']!r}" for each in error.errors()]
        raise BadInput("; ".join(lines)) from None
