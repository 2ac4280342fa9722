"""`cotune model`: the model versions of a run, their cards, and their adapters as peft loads them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from command_line.api_client import ApiClient
from command_line.connection import Format, RunArgument, Server, connect
from command_line.errors import BadInput
from command_line.output import (
    Columns,
    OutputFormat,
    bytes_text,
    console,
    facts_of,
    print_facts,
    print_item,
    print_items,
    print_rows,
)
from command_line.packages import Pulled, pull_package
from protocol.runs import ModelVersion, Scores, VersionStep

app = typer.Typer(no_args_is_help=True, help="The model versions of a run, and their adapters.")

VersionArgument = Annotated[
    int | None, typer.Argument(metavar="[VERSION]", min=0, help="Its number; without: the newest promoted one.")
]


def _standing(version: ModelVersion) -> str:
    if version.withdrawn_at is not None:
        return "withdrawn"
    return "promoted" if version.promoted else "not promoted"


def _scores(version: ModelVersion, rows: str) -> list[str]:
    measured = {name: Scores.model_validate(each) for name, each in (version.metrics.get(rows) or {}).items()}
    return [
        f"{name}: EM {each.exact_match:.1f}, Rouge-L {each.rouge_l:.1f}, {each.bits_per_byte:.3f} bits/byte"
        for name, each in measured.items()
    ]


COLUMNS: Columns[ModelVersion] = {
    "#Version": lambda each: each.number,
    "Is": _standing,
    "#Starts from": lambda each: each.parent,
    "#Updates": lambda each: each.num_updates,
    "Validation": lambda each: _scores(each, "validation"),
    "Test": lambda each: _scores(each, "test"),
    "Created (UTC)": lambda each: each.created_at,
}
LINEAGE_COLUMNS: Columns[VersionStep] = {
    "#Version": lambda each: each.number,
    "#Starts from": lambda each: each.parent,
    "#Round": lambda each: each.round_number,
    "#Attempt": lambda each: each.attempt,
    "#Updates": lambda each: each.num_updates,
    "#Late ones": lambda each: each.num_late_updates,
}


class AdapterName(StrEnum):
    """Which of a version's adapters."""

    LLM = "llm"
    PROXY = "proxy"


class ModelCard(BaseModel):
    """A model card, for JSON."""

    run_id: str
    version: int
    markdown: str


@app.command("list")
def list_versions(run_id: RunArgument, server: Server = None, output: Format = OutputFormat.TABLE) -> None:
    """List the versions of a run, oldest first: promoted or not, their scores, what went into them."""
    with connect(server) as client:
        print_items(client.list_versions(run_id), output, "version(s)", COLUMNS)


@app.command("show")
def show(
    run_id: RunArgument, number: VersionArgument = None, server: Server = None, output: Format = OutputFormat.TABLE
) -> None:
    """Show a version: its scores, its adapters, and where it comes from down to version 0."""
    with connect(server) as client:
        print_item(client.get_version(run_id, _wanted(client, run_id, number)), output, _describe)


@app.command("card")
def card(
    run_id: RunArgument, number: VersionArgument = None, server: Server = None, output: Format = OutputFormat.TABLE
) -> None:
    """Print a version's model card in Markdown: settings, data in counts, scores, bytes, how to load it."""
    with connect(server) as client:
        version = _wanted(client, run_id, number)
        found = ModelCard(run_id=run_id, version=version, markdown=client.model_card(run_id, version))
    print_item(found, output, lambda each: typer.echo(each.markdown, nl=False))


@app.command("pull")
def pull(
    *,
    run_id: RunArgument,
    number: VersionArgument = None,
    adapter: Annotated[AdapterName, typer.Option(help="The LLM's, or the proxy's.")] = AdapterName.LLM,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to; without: <run>-v<version>-<adapter> here.")
    ] = None,
    server: Server = None,
    output: Format = OutputFormat.TABLE,
) -> None:
    """Download an adapter as a folder for peft's `PeftModel.from_pretrained`: weights, settings, model card."""
    with connect(server) as client:
        version = _wanted(client, run_id, number)
        folder = to or Path(f"{run_id}-v{version}-{adapter.value}")
        pulled = pull_package(
            folder, lambda file: client.download_package(run_id, version, adapter.value, file), next_option="--to"
        )
    print_item(pulled, output, _tell)


def _wanted(client: ApiClient, run_id: str, number: int | None) -> int:
    """The version that was asked for, else the newest promoted one. Raises BadInput: there is none yet."""
    newest = client.get_run(run_id).latest_version if number is None else number
    if newest is None:
        raise BadInput(
            f"run {run_id} has no promoted version yet", next_step=f"`cotune run watch {run_id}` follows the run"
        )
    return newest


def _describe(version: ModelVersion) -> None:
    print_facts(
        {"Run": version.run_id}
        | facts_of(version, COLUMNS)
        | {
            "LLM adapter": version.llm_adapter_sha256,
            "Proxy adapter": version.proxy_adapter_sha256,
            "Withdrawn (UTC)": version.withdrawn_at,
            "Withdrawn because": version.withdrawn_reason,
        }
    )
    print_rows("Lineage", version.lineage, LINEAGE_COLUMNS)


def _tell(pulled: Pulled) -> None:
    out = console()
    out.print(f"{pulled.folder}: {bytes_text(sum(pulled.files.values()))}", markup=False, soft_wrap=True)
    for name, size in pulled.files.items():
        out.print(f"  {name}  {bytes_text(size)}", markup=False)
